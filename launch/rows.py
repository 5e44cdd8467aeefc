"""Read the rows to train and to evaluate on.

A source is the built-in task ("builtin:arithmetic"), a json, jsonl, csv or parquet file, a folder with train and test
files, or a dataset on the Hugging Face hub. A row has one of three forms:

- `instruction` (optionally `input`), `output`, and for evaluation by exact match or choice `answer` (and `choices`);
- `messages`: a list of {"role": ..., "content": ...}, the last one from the assistant;
- `text`: plain text, trained on as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from launch import arithmetic
from launch.template import Row

BUILTIN = "builtin:arithmetic"
BUILTIN_ROWS = {"train": 2000, "test": 400}
_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_TEST_NAMES = ("test", "validation", "valid", "dev", "eval")
_HELD_OUT = 200


@dataclass(frozen=True)
class Rows:
    """The rows of one split and where they came from, for error messages."""

    source: str
    rows: datasets.Dataset

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, count: int | None) -> Rows:
        """The first `count` rows (all of them for None)."""
        return self if count is None or count >= len(self) else replace(self, rows=self.rows.select(range(count)))


def load_splits(source: str, config: str | None = None, seed: int = 0) -> dict[str, Rows]:
    """The "train" and "test" rows of a source, checked row by row.

    A single file is split: the last tenth of it (at most 200 rows) becomes "test". A folder may hold only one of them.

    Raises:
        ValueError: no such source, unreadable, empty, or a row without the needed fields (file, row and fields named).
    """
    if source == BUILTIN:
        splits = {
            split: Rows(f"{BUILTIN}/{split}", datasets.Dataset.from_list(arithmetic.generate(split, count, seed)))
            for split, count in BUILTIN_ROWS.items()
        }
    elif source.startswith("builtin:"):
        raise ValueError(f"unknown built-in data {source!r}: the only one is {BUILTIN!r}")
    else:
        path = Path(source).expanduser()
        if path.is_file():
            splits = _hold_out(_read_file(path))
        elif path.is_dir():
            splits = _read_folder(path)
        elif path.suffix in _LOADERS or source.startswith(("/", ".", "~")):
            raise ValueError(f"no such data file or folder: {source}")
        else:
            splits = _read_hub(source, config)
    for split in splits.values():
        check_rows(split)
    return splits


def _read_file(path: Path) -> Rows:
    loader = _LOADERS.get(path.suffix)
    if loader is None:
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without an ending'}; use one of {sorted(_LOADERS)}"
        )
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        rows = datasets.load_dataset(loader, data_files=str(path), split="train")
    except Exception as error:  # datasets raises many types for a malformed file; all mean the same to the user
        cause = error.__cause__ or error
        raise ValueError(f"{path}: not readable as {loader}: {str(cause).splitlines()[0]}") from error
    return Rows(str(path), rows)


def _read_folder(folder: Path) -> dict[str, Rows]:
    files = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in _LOADERS}
    splits = {}
    if "train" in files:
        splits["train"] = _read_file(files["train"])
    test = next((files[name] for name in _TEST_NAMES if name in files), None)
    if test is not None:
        splits["test"] = _read_file(test)
    if not splits:
        raise ValueError(
            f"{folder}: no train or test file; expected train.jsonl and test.jsonl (or .json, .csv, .parquet), "
            f"found {sorted(path.name for path in folder.iterdir())[:10]}"
        )
    return splits if "test" in splits else _hold_out(splits["train"])


def _read_hub(name: str, config: str | None) -> dict[str, Rows]:
    try:
        found = datasets.load_dataset(name, config)
    except Exception as error:  # network, permission, name and script errors alike
        raise ValueError(
            f"data {name!r}: no such file or folder, and the hub did not give a dataset of that name: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if "train" not in found:
        raise ValueError(f"data {name!r}: the hub dataset has no train split, only {sorted(found)}")
    train = Rows(f"{name}/train", found["train"])
    test = next((Rows(f"{name}/{split}", found[split]) for split in _TEST_NAMES if split in found), None)
    return {"train": train, "test": test} if test is not None else _hold_out(train)


def _hold_out(rows: Rows) -> dict[str, Rows]:
    """Split off the end of the only file there is, so that evaluation never sees a training row."""
    held_out = min(_HELD_OUT, len(rows) // 10)
    if held_out == 0:
        return {"train": rows}
    border = len(rows) - held_out
    return {
        "train": replace(rows, rows=rows.rows.select(range(border))),
        "test": Rows(f"{rows.source} (rows from {border})", rows.rows.select(range(border, len(rows)))),
    }


def check_rows(rows: Rows) -> None:
    """Refuse an empty dataset and a row that cannot be trained on.

    Raises:
        ValueError: naming the source, the row's index and the fields found.
    """
    if len(rows) == 0:
        raise ValueError(f"{rows.source}: the dataset is empty")
    for index, row in enumerate(rows.rows):
        problem = _row_problem(row)
        if problem is not None:
            found = sorted(key for key, value in row.items() if value is not None)
            raise ValueError(
                f"{rows.source}: row {index} {problem}; a row needs `instruction` and `output`, or `messages`, or "
                f"`text` (fields found: {', '.join(found) or 'none'})"
            )


def _row_problem(row: Row) -> str | None:
    """Why the row cannot be used, or None."""
    if row.get("messages") is not None:
        return _messages_problem(row["messages"])
    for needed in (("instruction", "output"), ("text",)):
        if any(row.get(field) is not None for field in needed):
            missing = [field for field in needed if not isinstance(row.get(field), str) or not row[field].strip()]
            return f"has no text in {', '.join(missing)}" if missing else None
    return "has none of the needed fields"


def _messages_problem(messages: Any) -> str | None:
    if not isinstance(messages, Sequence) or not messages:
        return "has no list in messages"
    if not all(
        isinstance(message, Mapping) and message.get("role") and message.get("content") for message in messages
    ):
        return "has a message without role or content"
    return None if messages[-1]["role"] == "assistant" else "does not end with a message from the assistant"
