# SPDX-License-Identifier: Apache-2.0
"""The part of a checkpoint that one rank writes: its files, and ``grass_rank_<rank>.json``, which lists them.

Each file has a CRC-32 of its own. The CRCs inside the zip that ``torch.save`` writes are no substitute: they cover
neither its headers nor its padding, more than a quarter of the bits of a small file.
"""

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch

from grass_ds.core.durable_files import replace_file

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class FileSum:
    """Length of a file in bytes, and CRC-32 of its content or None."""

    bytes: int
    crc32: int | None

    def problem(self, path: Path, contents: bool) -> str | None:
        """How a file differs, as a message. Without ``contents`` it is not read, and only its length is compared."""
        try:
            size = path.stat().st_size
            if size != self.bytes:
                return f"{path.name} has {size} of {self.bytes} bytes"
            if contents and self.crc32 not in (None, crc32_of(path)):
                return f"{path.name} is not what was written (checksum)"
        except FileNotFoundError:
            return f"{path.name} is missing"
        except OSError:
            return f"{path.name} cannot be read"
        return None


def crc32_of(path: Path) -> int:
    total = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            total = zlib.crc32(block, total)
    return total


class SummedFile:
    """A new file, written from start to end, that computes its :class:`FileSum` and calls fsync on a clean exit."""

    def __init__(self, path: Path):
        self.bytes = self.crc32 = 0
        self.error: OSError | None = None  # the first: torch's zip writer goes on after it, and raises another later
        self._file = open(path, "wb")  # noqa: SIM115  closed in __exit__

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.crc32 = zlib.crc32(data, self.crc32)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        """Does nothing: the exit flushes."""

    def __enter__(self) -> "SummedFile":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    @property
    def sums(self) -> FileSum:
        return FileSum(self.bytes, self.crc32)


def write_summed(content: Any, path: Path, zipped: bool = True) -> FileSum:
    """``torch.save`` to a new file, on disk when this returns.

    Args:
        zipped: in torch's present format, see ``torch.save``.

    Raises:
        OSError: of the file, as on a full disk: torch would raise a RuntimeError without the reason.
    """
    with SummedFile(path) as file:
        try:
            torch.save(content, cast(IO[bytes], file), _use_new_zipfile_serialization=zipped)
        except RuntimeError as error:
            raise file.error or error from None
    return file.sums


@dataclass
class Part:
    """Content of ``grass_rank_<rank>.json``.

    Attributes:
        step: optimizer steps of the engine (``global_steps``).
        files: file name within the checkpoint's folder -> length and checksum.
        state_format: ``offload.state_format``, in which the optimizer states are saved.
        layout: on rank 0, [name, [[parameter, shape], ...]] of each unit; a run that resumes must have the same.
    """

    rank: int
    world_size: int
    zero_stage: int
    step: int
    files: dict[str, FileSum] = field(default_factory=dict)
    layout: list[Any] = field(default_factory=list)
    state_format: str = "fp32"

    @staticmethod
    def name(rank: int) -> str:
        return f"grass_rank_{rank}.json"

    def write(self, checkpoint: Path) -> None:
        """Write the file atomically and durably."""
        content = asdict(self)
        replace_file(checkpoint / self.name(self.rank), json.dumps({**content, "crc32": _crc32(content)}, indent=1))

    @classmethod
    def read(cls, checkpoint: Path, rank: int) -> "Part":
        """The part of ``rank``.

        Raises:
            ValueError: the file is missing or damaged.
        """
        path = checkpoint / cls.name(rank)
        try:
            content = json.loads(path.read_text())
            if content.pop("crc32") != _crc32(content):
                raise ValueError("checksum")
            part = cls(**{**content, "files": {name: FileSum(**sums) for name, sums in content["files"].items()}})
        except FileNotFoundError as error:
            raise ValueError(f"{path.name} is missing") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from error
        if part.rank != rank:
            raise ValueError(f"{path.name} is of rank {part.rank}")
        return part


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
