"""Read the rows to train and to evaluate on.

A source is the built-in task ("builtin:arithmetic"), a file, a folder with train and test files, a folder written by
`save_to_disk`, or a dataset on the Hugging Face hub. `launch.data.text_files` says which files can be read,
`launch.data.formats` which records. A row has one of three forms:

- `instruction` (optionally `input`), `output`, and for evaluation by exact match or choice `answer` (and `choices`);
- `messages`: a JSON list of {"role": ..., "content": ...}, the last one from the assistant;
- `text`: plain text, trained on as a whole.

Rows are counted from 0 in messages, in each file anew, and lines from 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import datasets

from launch.data import arithmetic, formats, records, split_files, text_files
from launch.data.records import Record
from launch.data.row_table import checked_rows, first_line
from launch.data.rows import Rows, split_off_test

BUILTIN = "builtin:arithmetic"
BUILTIN_ROWS = {"train": 2000, "test": 400}


def load_splits(
    source: str, config: str | None = None, seed: int = 0, *, encoding: str = text_files.UTF8, hold_out: bool = True
) -> dict[str, Rows]:
    """The "train" and "test" rows of a source, checked row by row.

    Where a source has training rows only, as a single file has, `hold_out` splits off the last tenth of them (at most
    200 rows) as "test". A folder may have test rows only.

    Args:
        config: the configuration of a hub dataset.
        encoding: of text files that do not begin with a byte order mark.

    Raises:
        ValueError: no such source, unreadable, empty, or a row without the needed fields (file, row and fields named).
    """
    if source == BUILTIN:
        return {
            split: Rows(f"{BUILTIN}/{split}", datasets.Dataset.from_list(arithmetic.generate(split, count, seed)))
            for split, count in BUILTIN_ROWS.items()
        }
    if source.startswith("builtin:"):
        raise ValueError(f"unknown built-in data {source!r}: the only one is {BUILTIN!r}")
    text_files.check_encoding(encoding)
    path = Path(source).expanduser()
    if path.is_file():
        splits = {"train": _read_files(str(path), (path,), encoding)}
    elif path.is_dir():
        splits = _read_folder(path, encoding)
    elif text_files.format_of(path) is not None or source.startswith(("/", ".", "~")):
        raise ValueError(f"no such data file or folder: {source}")
    else:
        splits = _read_hub(source, config)
    return split_off_test(splits["train"]) if hold_out and "test" not in splits else splits


def load_test(source: str, config: str | None = None, *, encoding: str = text_files.UTF8) -> Rows:
    """The rows of a source that is given as test data: all rows of a file, else the source's own test rows.

    Raises:
        ValueError: see `load_splits`; or a folder or dataset without test rows.
    """
    splits = load_splits(source, config, encoding=encoding, hold_out=False)
    if "test" not in splits and not _is_one_table(source):
        raise ValueError(
            f"{source} has training rows only ({splits['train'].source}); to measure on a file, name the file; test "
            f"files of a folder and splits of a dataset are called {', '.join(split_files.TEST_NAMES)}"
        )
    return splits["test" if "test" in splits else "train"]


def load_measured(source: str, split: str, config: str | None = None, *, encoding: str = text_files.UTF8) -> Rows:
    """The rows to measure on: "test" (see `load_test`), "train", or "held_out" (what `load_splits` splits off).

    Raises:
        ValueError: see `load_splits`; or the source has no such rows.
    """
    if split == "test":
        return load_test(source, config, encoding=encoding)
    if split not in ("train", "held_out"):
        raise ValueError(f"--split {split!r}: choose test, train or held_out")
    splits = load_splits(source, config, encoding=encoding, hold_out=split == "held_out")
    found = splits.get("train" if split == "train" else "test")
    if found is None or (split == "held_out" and not found.held_out):
        there = ", ".join(f"{name} ({len(rows)} rows)" for name, rows in sorted(splits.items()))
        raise ValueError(f"{source} has no {split} rows, only {there}; choose another --split")
    return found


def _is_one_table(source: str) -> bool:
    path = Path(source).expanduser()
    return path.is_file() or (path / "state.json").is_file()


def _read_files(source: str, paths: tuple[Path, ...], encoding: str) -> Rows:
    """The rows of one file, or of files that are the parts of one."""

    def parts() -> Iterator[Iterable[Record]]:
        return (records.read(path, encoding, formats.USED) for path in paths)

    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return checked_rows(source, tuple(map(str, paths)), parts, [encoding, *stats])


def _read_folder(folder: Path, encoding: str) -> dict[str, Rows]:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _read_saved(folder)
    found = split_files.find(folder)
    return {
        split: replace(_read_files(_name_of(paths), paths, encoding), unread=found.unread)
        for split, paths in found.splits.items()
    }


def _name_of(paths: tuple[Path, ...]) -> str:
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"


def _read_saved(folder: Path) -> dict[str, Rows]:
    """What `save_to_disk` of a Dataset or a DatasetDict has written."""
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder raises many types; all mean the same to the user
        raise ValueError(
            f"{folder}: not readable as a folder of save_to_disk: {first_line(error)}; save the dataset again"
        ) from error
    return _of_splits(str(folder), {"train": found} if isinstance(found, datasets.Dataset) else found)


def _read_hub(name: str, config: str | None) -> dict[str, Rows]:
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # network, permission, name and script errors alike
        raise ValueError(
            f"data {name!r}: no such file or folder, and the hub did not give a dataset of that name: "
            f"{first_line(error)}"
        ) from error
    return _of_splits(name, found)


def _of_splits(name: str, found: Mapping[str, datasets.Dataset]) -> dict[str, Rows]:
    test = next((split for split in split_files.TEST_NAMES if split in found), None)
    names = {"train": "train"} if "train" in found else {}
    names |= {"test": test} if test is not None else {}
    if not names:
        raise ValueError(f"{name}: no split named train or {', '.join(split_files.TEST_NAMES)}, only {sorted(found)}")
    unread = tuple(f"split {split}" for split in sorted(found) if split not in names.values())
    return {
        split: replace(_read_dataset(f"{name}/{theirs}", found[theirs]), unread=unread)
        for split, theirs in names.items()
    }


def _read_dataset(source: str, dataset: datasets.Dataset) -> Rows:
    names = dataset.column_names
    known = [name for name in names if name in formats.USED]

    def parts() -> Iterator[Iterable[Record]]:
        yield (records.of_table(values, names) for values in (dataset.select_columns(known) if known else [{}]))

    return checked_rows(source, (source,), parts, [dataset._fingerprint])
