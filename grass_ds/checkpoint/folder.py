# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders on disk: which are complete, and how one becomes visible.

[Note: Publication] A checkpoint is complete or invisible. All ranks write into ``.saving.<tag>``, which no tool looks into; every file
is fsynced, and each rank's last one, its :class:`Part`, says which files it wrote, how long they are and what their checksums are. When
the parts of all ranks are there, rank 0 renames the folder to ``<tag>`` and then rewrites ``latest``, by a rename as well. A process
killed at any moment leaves the previous checkpoint, the new one, or both. What DeepSpeed's tools read is as they know it: parts are
further files beside theirs.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LATEST = "latest"
_BLOCK = 1 << 24
# Being written by this process: another engine in it may save to the same folder.
_underway: set[Path] = set()


@dataclass(frozen=True)
class FileSum:
    """What a file must be: its length in bytes and the CRC-32 of its content."""

    bytes: int
    crc32: int


@dataclass
class Part:
    """What one rank wrote, kept as ``grass_rank_<rank>.json``.

    Attributes:
        step: optimizer steps of the engine (``global_steps``).
        files: name within the checkpoint's folder -> what it must be.
        layout: per unit its name and its parameters' [name, shape], on rank 0; what a run must have alike to go on from here.
    """

    rank: int
    world_size: int
    zero_stage: int
    step: int
    files: dict[str, FileSum] = field(default_factory=dict)
    layout: list[Any] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, int, int, int]:
        """What tells it from the parts of other ranks and checkpoints."""
        return self.rank, self.world_size, self.zero_stage, self.step

    @staticmethod
    def name(rank: int) -> str:
        return f"grass_rank_{rank}.json"

    def write(self, checkpoint: Path) -> None:
        """Write it durably: it is there as a whole, or not at all."""
        content = asdict(self)
        replace_file(checkpoint / self.name(self.rank), json.dumps({**content, "crc32": _sum_of(content)}, indent=1))

    @classmethod
    def read(cls, checkpoint: Path, rank: int) -> "Part | None":
        """The part of that rank, None if it has none.

        Raises:
            ValueError: the file cannot be understood.
        """
        path = checkpoint / cls.name(rank)
        try:
            content = json.loads(path.read_text())
            if content.pop("crc32") != _sum_of(content):
                raise ValueError("checksum")
            return cls(**{**content, "files": {name: FileSum(**sums) for name, sums in content["files"].items()}})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from error


def _sum_of(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


# ---- writing ---------------------------------------------------------------------------------------------------------------


class SummedFile:
    """A new file to be written from start to end, which knows its length and checksum and is on disk when closed without an error.

    Attributes:
        error: the first error of a write. Callers that go on after one, like torch's zip writer, may raise another later.
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
                done += self._file.write(view[done : done + _BLOCK])
        except OSError as error:
            self.error = self.error or error
            raise
        self.crc32 = zlib.crc32(view, self.crc32)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is kept back."""

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


@contextmanager
def syncing(path: Path) -> Iterator[None]:
    """Make the names in a folder survive a power failure, as they are at the end. Inside, the folder may be given another name.

    Some network file systems do not sync folders, and some folders may be passed through but not read: then nothing more can be done.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        yield
        return
    try:
        yield
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """See :func:`syncing`."""
    with syncing(path):
        pass


def replace_file(path: Path, content: str) -> None:
    """Write a small file durably and at once: readers see the old content or the new."""
    aside = path.with_name(f".{path.name}.new")
    with SummedFile(aside) as file:
        file.write(content.encode())
    with syncing(path.parent):  # with its last part a checkpoint's folder may get another name
        os.replace(aside, path)


def check_tag(tag: str) -> None:
    """Refuse a tag that does not name a folder below the one that is saved to.

    Raises:
        ValueError: it is empty, absolute, goes upwards or is hidden.
    """
    path = Path(tag)
    if path.is_absolute() or not path.parts or ".." in path.parts or path.name.startswith("."):
        raise ValueError(
            f"tag = {tag!r}: expected the name of a folder to make in save_dir, relative and not beginning with a dot; leave it out for "
            "global_step<n>"
        )


def saving_tag(tag: str) -> str:
    """The tag that DeepSpeed is told: where the checkpoint is while it is being written."""
    return str(Path(tag).with_name(f".saving.{Path(tag).name}"))


def saving_path(folder: Path, tag: str) -> Path:
    """The folder of :func:`saving_tag`."""
    return folder / saving_tag(tag)


def begin(folder: Path, tag: str) -> None:
    """Make an empty place to write to. What other attempts in ``folder`` left behind goes; published checkpoints stay."""
    target = saving_path(folder, tag)
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = [
        p for p in target.parent.glob(".replaced.*") if p.with_name(p.name.removeprefix(".replaced.")).exists()
    ]
    for left in {*target.parent.glob(".saving.*"), *replaced} - _underway:
        shutil.rmtree(left)
    target.mkdir()
    _underway.add(target)


def give_up(folder: Path, tag: str) -> None:
    """Remove what was written of it so far, as far as that is possible."""
    shutil.rmtree(saving_path(folder, tag), ignore_errors=True)
    _underway.discard(saving_path(folder, tag))


def publish(folder: Path, tag: str, latest: bool) -> None:
    """Make the checkpoint visible, see [Note: Publication]; an older one of the same tag is there until then."""
    target = folder / tag
    aside = target.with_name(f".replaced.{target.name}")
    sync_folder(saving_path(folder, tag))
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    os.rename(saving_path(folder, tag), target)
    _underway.discard(saving_path(folder, tag))
    for parent in {target.parent, folder, folder.parent}:
        sync_folder(parent)
    if latest:
        replace_file(folder / LATEST, tag)
    shutil.rmtree(aside, ignore_errors=True)


def restore_replaced(checkpoint: Path) -> None:
    """Undo a publication that was cut off between its renames."""
    aside = checkpoint.with_name(f".replaced.{checkpoint.name}")
    with suppress(OSError):  # a folder that can only be read: the checkpoint is missing then
        if aside.is_dir() and not checkpoint.exists():
            os.rename(aside, checkpoint)


# ---- reading ---------------------------------------------------------------------------------------------------------------


def candidates(folder: Path) -> list[str]:
    """Tags to resume from, best first: the one that ``latest`` names, then the others that were published, newest step first."""
    tag = named_latest(folder)
    named = [] if tag is None else [tag]
    steps = {path.parent.name: step_of(path.parent) for path in folder.glob(f"[!.]*/{Part.name(0)}")}
    others = [tag for tag in steps if tag not in named]
    return [*named, *sorted(others, key=lambda tag: steps[tag] or 0, reverse=True)]


def named_latest(folder: Path, name: str = LATEST) -> str | None:
    """The tag that ``latest`` names; None if there is no such file or nothing readable in it."""
    try:
        return (folder / name).read_text().strip() or None
    except (OSError, ValueError):
        return None


def listed(found: Sequence[str], most: int = 4) -> str:
    """The first few in one line."""
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def step_of(checkpoint: Path) -> int | None:
    """Optimizer steps of a checkpoint; None if it does not say."""
    try:
        part = Part.read(checkpoint, 0)
    except ValueError:
        return None
    return None if part is None else part.step


def problems(checkpoint: Path) -> list[str]:
    """What is missing or cut off in a published checkpoint; nothing if all files of all ranks are there in their length.

    A checkpoint without parts was written by something else, and cannot be judged.
    """
    try:
        if not checkpoint.is_dir():
            return [f"{checkpoint.name} is not there"]
        if not is_ours(checkpoint):
            return [] if any(checkpoint.iterdir()) else [f"{checkpoint.name} is empty"]
    except OSError as error:
        return [f"{checkpoint.name} cannot be looked into ({error})"]
    found: list[str] = []
    first: Part | None = None
    for rank in ranks_of(checkpoint) or range(1):
        try:
            part = Part.read(checkpoint, rank)
        except ValueError as error:
            found.append(str(error))
            continue
        if part is None:
            found.append(f"{Part.name(rank)} is missing")
            continue
        first = first or part
        if part.key != (rank, *first.key[1:]):
            found.append(f"{Part.name(rank)} is of another checkpoint")
        found += [text for name, sums in part.files.items() if (text := _lacks(checkpoint / name, sums))]
    return found


def is_ours(checkpoint: Path) -> bool:
    """Whether it was written with parts; DeepSpeed alone writes none."""
    return any(checkpoint.glob("grass_rank_*.json"))


def _lacks(path: Path, sums: FileSum) -> str | None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error})"
    return None if size == sums.bytes else f"{path.name} has {size} of {sums.bytes} bytes"


def corrupt(checkpoint: Path, ranks: Iterable[int] | None = None) -> list[str]:
    """Files whose content is not what was written, of those that the parts of ``ranks`` (default: all) know. Reads them as a whole."""
    known: dict[str, FileSum] = {}
    for rank in ranks_of(checkpoint) if ranks is None else ranks:
        with suppress(ValueError):  # see problems()
            part = Part.read(checkpoint, rank)
            known |= {} if part is None else part.files
    workers = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:  # reads and checksums let go of the interpreter
        sums = list(pool.map(lambda name: _checksum(checkpoint / name), known))
    return [
        f"{name} {'cannot be read' if crc32 is None else 'is not what was written (checksum)'}"
        for name, crc32 in zip(known, sums, strict=True)
        if crc32 != known[name].crc32
    ]


def ranks_of(checkpoint: Path) -> range:
    """The ranks that wrote it, by its first part; none if that says nothing."""
    with suppress(ValueError):
        part = Part.read(checkpoint, 0)
        return range(0 if part is None else part.world_size)
    return range(0)


def _checksum(path: Path) -> int | None:
    """CRC-32 of a file; None if it cannot be read."""
    total = 0
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                total = zlib.crc32(block, total)
    except OSError:
        return None
    return total
