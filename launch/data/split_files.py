"""Find the training and test files of a folder by their names."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from launch.data import text_files

TEST_NAMES = ("test", "validation", "valid", "val", "dev", "eval")
_SHARD = re.compile(r"(?P<name>.+)-(?P<index>\d+)-of-(?P<count>\d+)")


@dataclass
class Found:
    """The files of each split, the parts of a split in order, and the names of files that belong to none."""

    splits: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    unread: tuple[str, ...] = ()


def find(folder: Path) -> Found:
    """The files named train and test (or validation, val, dev, eval), also in parts: train-00000-of-00002.parquet.

    Raises:
        ValueError: neither; several files of one split; a part that is missing.
    """
    inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    named = defaultdict(list)
    for path in inside:
        if path.is_file() and text_files.format_of(path) is not None:
            named[_split_of(path)].append(path)
    found = Found()
    for split, names in (("train", ("train",)), ("test", TEST_NAMES)):
        name = next((name for name in names if name in named), None)
        if name is not None:
            found.splits[split] = _parts(folder, name, named[name])
    if not found.splits:
        if (folder / "data").is_dir():  # as repositories of the hub are laid out
            return find(folder / "data")
        raise ValueError(_nothing_found(folder, inside))
    read = {path for paths in found.splits.values() for path in paths}
    found.unread = tuple(path.name + "/" * path.is_dir() for path in inside if path not in read)
    return found


def _split_of(path: Path) -> str:
    stem = text_files.split_name(path)[0].lower()
    shard = _SHARD.fullmatch(stem)
    return shard["name"] if shard else stem


def _parts(folder: Path, name: str, paths: list[Path]) -> tuple[Path, ...]:
    """The one file of a split, or its parts in order."""
    shards = {path: _SHARD.fullmatch(text_files.split_name(path)[0]) for path in paths}
    if len(paths) == 1 and shards[paths[0]] is None:
        return (paths[0],)
    names = ", ".join(path.name for path in paths)
    kinds = {(shard["count"] if shard else None, text_files.split_name(path)[1]) for path, shard in shards.items()}
    if len(kinds) > 1 or None in shards.values():
        raise ValueError(f"{folder}: several {name} files ({names}); keep one of them, or name the one to read")
    order = {int(shard["index"]): path for path, shard in shards.items() if shard is not None}
    count = next(int(shard["count"]) for shard in shards.values() if shard is not None)
    missing = sorted(set(range(count)) - order.keys())
    if missing or len(order) != count:
        raise ValueError(f"{folder}: {name} has {count} parts, but part {missing[:5]} is not there; found {names}")
    return tuple(order[index] for index in range(count))


def _nothing_found(folder: Path, inside: list[Path]) -> str:
    readable = [path for path in inside if path.is_file() and text_files.format_of(path) is not None]
    advice = f"; to read one file, name it: {readable[0]}" if readable else ""
    return (
        f"{folder}: no train or test file; expected train.jsonl and test.jsonl (or {text_files.readable_endings()}; "
        f"{', '.join(TEST_NAMES[1:])} are names of test files too), found {[path.name for path in inside][:10]}"
        f"{advice}"
    )
