# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders on disk: which are complete, and how one becomes visible.

[Note: Publication] A checkpoint is complete or invisible. All ranks write into ``.saving.<tag>``, which no tool reads.
Every file is fsynced. The last file of each rank, its :class:`~grass_ds.checkpoint.part.Part`, lists the others with
their lengths and checksums. When the parts of all ranks are there, rank 0 renames the folder to ``<tag>`` and then
rewrites ``latest``, also by a rename. A process killed at any moment leaves the previous checkpoint, the new one, or
both. DeepSpeed's tools find their files as they know them, and the parts beside them.
"""

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from grass_ds.checkpoint.part import FileSum, Part
from grass_ds.core.durable_files import replace_file, sync_folder

LATEST = "latest"
# Folders that this process is writing: another engine in it may save beside them.
_being_written: set[Path] = set()


def check_tag(tag: str) -> None:
    """Raise ValueError for a tag that is empty, absolute, goes upwards or is hidden."""
    path = Path(tag)
    if path.is_absolute() or not path.parts or ".." in path.parts or path.name.startswith("."):
        raise ValueError(
            f"tag = {tag!r}: expected the name of a folder to make in save_dir, relative and not beginning with a dot; "
            "leave it out for global_step<n>"
        )


def saving_tag(tag: str) -> str:
    """The tag that DeepSpeed is given: names the folder of a checkpoint until it is published."""
    return str(saving_path(Path(), tag))


def saving_path(folder: Path, tag: str) -> Path:
    return (folder / tag).with_name(f".saving.{Path(tag).name}")


def prepare(folder: Path, tag: str) -> None:
    """Make an empty folder for a new checkpoint, and remove the unpublished ones that killed jobs left."""
    target = saving_path(folder, tag)
    target.parent.mkdir(parents=True, exist_ok=True)
    replaced = [
        p for p in target.parent.glob(".replaced.*") if p.with_name(p.name.removeprefix(".replaced.")).exists()
    ]
    for leftover in {*target.parent.glob(".saving.*"), *replaced} - _being_written:
        shutil.rmtree(leftover)
    target.mkdir()
    _being_written.add(target)


def discard(folder: Path, tag: str) -> None:
    """Remove an unpublished checkpoint, as far as that is possible."""
    shutil.rmtree(saving_path(folder, tag), ignore_errors=True)
    _being_written.discard(saving_path(folder, tag))


def publish(folder: Path, tag: str, latest: bool) -> None:
    """Make the checkpoint visible, see [Note: Publication]. An older one of the same tag stays until then."""
    saved, target = saving_path(folder, tag), folder / tag
    aside = target.with_name(f".replaced.{target.name}")
    if target.exists():
        os.rename(target, aside)
    os.rename(saved, target)
    _being_written.discard(saved)
    for parent in {target.parent, folder, folder.parent}:
        sync_folder(parent)
    if latest:
        replace_file(folder / LATEST, tag)
    shutil.rmtree(aside, ignore_errors=True)


def restore_replaced(checkpoint: Path) -> None:
    """Undo a publication that was killed between its two renames."""
    aside = checkpoint.with_name(f".replaced.{checkpoint.name}")
    with suppress(OSError):  # in a read-only folder the checkpoint is missing then
        if aside.is_dir() and not checkpoint.exists():
            os.rename(aside, checkpoint)


def candidates(folder: Path) -> list[str]:
    """Tags to resume from, best first: that of ``latest``, then the other published ones, newest step first."""
    steps = {path.parent.name: step_of(path.parent) or 0 for path in folder.glob(f"[!.]*/{Part.name(0)}")}
    others = sorted(steps, key=lambda tag: steps[tag], reverse=True)
    tag = named_latest(folder)
    return others if tag is None else [tag, *(other for other in others if other != tag)]


def named_latest(folder: Path, name: str = LATEST) -> str | None:
    """The tag in the file ``latest``; None if the file is missing, empty or unreadable."""
    try:
        return (folder / name).read_text().strip() or None
    except (OSError, ValueError):
        return None


def step_of(checkpoint: Path) -> int | None:
    """Optimizer steps of a checkpoint; None if its first part is missing or damaged."""
    with suppress(ValueError):
        return Part.read(checkpoint, 0).step
    return None


def ranks_of(checkpoint: Path) -> range:
    """The ranks that wrote the checkpoint; empty if its first part is missing or damaged."""
    with suppress(ValueError):
        return range(Part.read(checkpoint, 0).world_size)
    return range(0)


def has_parts(checkpoint: Path) -> bool:
    """Whether grass_ds wrote it; plain DeepSpeed writes no parts."""
    return any(checkpoint.glob("grass_rank_*.json"))


def problems(checkpoint: Path) -> list[str]:
    """Files of a published checkpoint that are missing or have another length, as messages. Reads no contents.

    Without parts another program wrote it, and only an empty folder is found.
    """
    try:
        if not checkpoint.is_dir():
            return [f"{checkpoint.name} is not there"]
        if not has_parts(checkpoint):
            return [] if any(checkpoint.iterdir()) else [f"{checkpoint.name} is empty"]
    except OSError as error:
        return [f"{checkpoint.name} cannot be looked into ({error})"]
    found: list[str | None] = []
    first = None
    for rank in ranks_of(checkpoint) or range(1):
        try:
            part = Part.read(checkpoint, rank)
        except ValueError as error:
            found.append(str(error))
            continue
        key = part.world_size, part.zero_stage, part.step
        first = first or key
        if key != first:
            found.append(f"{Part.name(rank)} is of another checkpoint")
        found += [sums.problem(checkpoint / name, contents=False) for name, sums in part.files.items()]
    return [text for text in found if text]


def corrupt(checkpoint: Path, ranks: Iterable[int] | None = None) -> list[str]:
    """Files of the parts of ``ranks`` (default: all) with a wrong checksum, as messages. Reads all their contents."""
    expected: dict[str, FileSum] = {}
    for rank in ranks_of(checkpoint) if ranks is None else ranks:
        with suppress(ValueError):  # problems() reports a damaged part
            expected |= Part.read(checkpoint, rank).files
    with ThreadPoolExecutor(8) as pool:  # reading and zlib.crc32 release the GIL
        found = pool.map(lambda name: expected[name].problem(checkpoint / name, contents=True), expected)
        return [text for text in found if text]
