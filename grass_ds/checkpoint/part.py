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
from typing import Any

from grass_ds.core.durable_files import replace_file

BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class FileSum:
    """The length of a file in bytes and the CRC-32 of its content."""

    bytes: int
    crc32: int


class SummedFile:
    """A new file, written from start to end, that computes its :class:`FileSum` and calls fsync on a clean exit.

    Attributes:
        error: the first error of a write. torch's zip writer goes on after one, and raises another later.
    """

    def __init__(self, path: Path):
        self.bytes = self.crc32 = 0
        self.error: OSError | None = None
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  closed in __exit__

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        try:
            while done < len(view):
                done += self._file.write(view[done : done + BLOCK_BYTES])
        except OSError as error:
            self.error = self.error or error
            raise
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Does nothing: writes are not buffered."""

    def __enter__(self) -> "SummedFile":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def sums(self) -> FileSum:
        return FileSum(self.bytes, self.crc32)


@dataclass
class Part:
    """Content of ``grass_rank_<rank>.json``.

    Attributes:
        step: optimizer steps of the engine (``global_steps``).
        files: file name within the checkpoint's folder -> length and checksum.
        layout: on rank 0, [name, [[parameter, shape], ...]] of each unit; a run that resumes must have the same.
    """

    rank: int
    world_size: int
    zero_stage: int
    step: int
    files: dict[str, FileSum] = field(default_factory=dict)
    layout: list[Any] = field(default_factory=list)

    @property
    def checkpoint_key(self) -> tuple[int, int, int]:
        """Equal for all parts of one checkpoint."""
        return self.world_size, self.zero_stage, self.step

    @staticmethod
    def name(rank: int) -> str:
        return f"grass_rank_{rank}.json"

    def write(self, checkpoint: Path) -> None:
        """Write the file atomically and durably."""
        content = asdict(self)
        replace_file(checkpoint / self.name(self.rank), json.dumps({**content, "crc32": _crc32(content)}, indent=1))

    @classmethod
    def read(cls, checkpoint: Path, rank: int) -> "Part | None":
        """The part of ``rank``; None if there is no such file.

        Raises:
            ValueError: the file is damaged.
        """
        path = checkpoint / cls.name(rank)
        try:
            content = json.loads(path.read_text())
            if content.pop("crc32") != _crc32(content):
                raise ValueError("checksum")
            part = cls(**{**content, "files": {name: FileSum(**sums) for name, sums in content["files"].items()}})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from error
        if part.rank != rank:
            raise ValueError(f"{path.name} is of rank {part.rank}")
        return part


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
