"""Rows of any source as a table on disk, each of them checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets.fingerprint import Hasher

from launch.data import formats, messages, records, text_files, values
from launch.data.records import Record
from launch.data.rows import Rows, location

# The number of a row's file among those of its split, the row in that file, and its line if it has one.
_ORIGIN = {name: datasets.Value("int64") for name in ("file", "row", "line")}
_FEATURES = datasets.Features({**formats.FEATURES, "origin": _ORIGIN})


Parts = Callable[[], Iterator[Iterable[Record]]]


def checked_rows(source: str, names: tuple[str, ...], parts: Parts, key: Any) -> Rows:
    """The rows as a table on disk, which `datasets` caches under a name made from `key` and from this program's text.

    Args:
        names: of the parts.

    Raises:
        ValueError: no rows, or one that cannot be trained on.
    """
    generator = _Generator(partial(_rows, source, names, parts), Hasher.hash([*_program(), *key]))
    try:
        table = datasets.Dataset.from_generator(generator, features=_FEATURES, split=datasets.NamedSplit("rows"))
    except Exception as error:  # datasets wraps what its generator raises
        raise ValueError(_message(source, error)) from error
    return Rows(source, table, parts=names)


def _rows(source: str, names: tuple[str, ...], parts: Parts) -> Iterator[dict[str, Any]]:
    found = None
    for part, (name, records_of_part) in enumerate(zip(names, parts(), strict=True)):
        for index, record in enumerate(records_of_part):
            found = _row(record, location(name, index, record.line))
            # The number of the part, not its name: other spellings of a file's name share the table.
            yield {**formats.columns_of(found), "origin": {"file": part, "row": index, "line": record.line}}
    if found is None:
        raise ValueError(f"{source}: the file holds no rows")


class _Generator:
    """Yields what `rows` yields; `datasets` names the table by what this pickles to, which is `key` alone."""

    def __init__(self, rows: Callable[[], Iterator[dict[str, Any]]], key: str):
        self._rows, self._key = rows, key

    def __call__(self) -> Iterator[dict[str, Any]]:
        return self._rows()

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self._key,)


def _row(record: Record, where: str) -> dict[str, Any]:
    try:
        return formats.row_of(record.values)
    except ValueError as error:
        hint = record.hint if isinstance(error, formats.UnknownFields) else ""
        raise ValueError(f"{where} {error}{hint}") from error


def _program() -> list[bytes]:
    """The text of all that decides what a record becomes."""
    others = [Path(str(module.__file__)) for module in (text_files, records, formats, values, messages)]
    return [path.read_bytes() for path in (Path(__file__), *others)]


def _message(source: str, error: BaseException) -> str:
    """What a user can act on: the error behind those that were made of it."""
    while error.__cause__ is not None and not isinstance(error, ValueError | OSError):
        error = error.__cause__
    if isinstance(error, ValueError | OSError):
        return str(error)
    return f"{source}: not readable: {type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).splitlines()), type(error).__name__)
