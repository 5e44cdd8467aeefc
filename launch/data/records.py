"""Read the records of a data file: JSON lines, a JSON document, csv, tsv or parquet.

A record is a mapping from the file's own column names to values. Nothing is guessed: a csv value is a string, and a
JSON number is the text that the file holds.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from launch.data import text_files

_AS_RECORDS = "write one object a row; with pandas: df.to_json(path, orient='records', lines=True)"
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


class Number(str):
    """A JSON number as the file writes it: 1.50 and 12345678901234567890 keep their digits."""


class NotANumber(Number):
    """NaN or Infinity, which Python writes into JSON files although JSON has no such values."""


@dataclass(frozen=True)
class Record:
    """One row as the file holds it, and the line that it begins in where the file has one line or more per row."""

    values: Mapping[str, Any]
    line: int | None = None
    hint: str = ""
    """What to say where the names of its fields are unknown."""


def read(path: Path, encoding: str = text_files.UTF8, used: Collection[str] | None = None) -> Iterator[Record]:
    """The records of a file, in order.

    Args:
        used: the columns whose values are needed; None for all. Of a parquet file no other is read.

    Raises:
        ValueError: (also while they are read) not such a file, with the line and the remedy.
    """
    kind = text_files.format_of(path)
    if kind is None:
        ending = text_files.split_name(path)[1] or "a file without an ending"
        raise ValueError(f"{path}: cannot read {ending}; use one of {text_files.readable_endings()}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if kind == "parquet":
        return _read_parquet(path, used)
    return _read_json(path, encoding) if kind == "json" else _read_csv(path, encoding)


# ---- json -----------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """A JSON value whose numbers are `Number`s.

    Raises:
        ValueError: not JSON, nested too deeply, or an object that names a field twice.
    """
    try:
        return _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {next(name for name in names if names.count(name) > 1)!r} twice")
    return found


_DECODER = json.JSONDecoder(parse_int=Number, parse_float=Number, parse_constant=NotANumber, object_pairs_hook=_unique)


def _read_json(path: Path, encoding: str) -> Iterator[Record]:
    """JSON lines where the first line is a row and others follow, or the name says so; else one document."""
    with text_files.open_text(path, encoding) as text:
        lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
        start, first = next(lines, (0, ""))
        if not first:
            raise ValueError(f"{path}: the file holds no rows")
        following = next(lines, None)
        if (following is not None or text_files.is_json_lines(path)) and _begins_json_lines(path, first):
            yield _record_of_line(path, start, first)
            for number, line in chain([following] if following is not None else [], lines):
                yield _record_of_line(path, number, line)
            return
    yield from _read_document(path, encoding, start if following is None else None)


def _begins_json_lines(path: Path, first: str) -> bool:
    """Whether the first line is a row of its own, as far as one can tell from a line that may be broken."""
    try:
        return not isinstance(parse_json(first), list)
    except ValueError:
        # A pretty-printed object begins with its brace alone, a list with its bracket; all else is a broken row.
        return text_files.is_json_lines(path) and first.strip() != "{" and not first.lstrip().startswith("[")


def _record_of_line(path: Path, number: int, line: str) -> Record:
    try:
        value = parse_json(line.strip())
    except json.JSONDecodeError as error:
        raise ValueError(_not_json(path, number, error)) from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as json: line {number}: {error}") from error
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: line {number} holds {name_of_type(value)}, not an object: {_AS_RECORDS}")
    return Record(value, number)


def _read_document(path: Path, encoding: str, only_line: int | None) -> Iterator[Record]:
    with text_files.open_text(path, encoding) as file:
        text = file.read()
    try:
        document = parse_json(text.strip())
    except json.JSONDecodeError as error:
        skipped = text[: len(text) - len(text.lstrip())].count("\n")
        raise ValueError(_not_json(path, error.lineno + skipped, error)) from error
    except ValueError as error:
        raise ValueError(f"{path}: not readable as json: {error}") from error
    rows = [document] if _is_row(document) else _rows_within(path, document)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{path}: row {index} is {name_of_type(row)}, not an object: {_AS_RECORDS}")
        yield Record(row, only_line if row is document else None)


def _not_json(path: Path, line: int, error: json.JSONDecodeError) -> str:
    before, here = error.doc[: error.pos].rstrip(), error.doc[error.pos : error.pos + 1]
    problem = f"{error.msg} in column {error.colno}"
    if (before.endswith(",") and here in ("]", "}", "")) or (error.msg == "Extra data" and here == ","):
        problem = "a comma that nothing follows; remove it"
    elif error.pos >= len(error.doc.rstrip()):
        problem = f"it ends in the middle ({error.msg})"
    elif error.msg == "Extra data":
        problem += "; write one object a line, or all in one list"
    return f"{path}: not readable as json: line {line}: {problem}"


_LISTS_OF_A_ROW = ("messages", "conversations", "prompt", "completion")
_TEXTS_OF_A_ROW = (*_LISTS_OF_A_ROW, "instruction", "output", "text", "question", "answer")


def _is_row(document: Any) -> bool:
    """Whether an object is a row: it holds a text or a list of messages where columns would be lists of them."""
    return isinstance(document, Mapping) and (
        any(isinstance(document.get(field), str) for field in _TEXTS_OF_A_ROW)
        or any(_is_list_of(document.get(field), Mapping) for field in _LISTS_OF_A_ROW)
    )


def _rows_within(path: Path, document: Any) -> Sequence[Any]:
    """The rows of a document that is a list, wraps one in an object, or is an object of columns."""
    if isinstance(document, list):
        if not document:
            raise ValueError(f"{path}: the file holds no rows")
        return document
    if not isinstance(document, Mapping):
        raise ValueError(f"{path}: the file holds {name_of_type(document)}, not rows: {_AS_RECORDS}")
    values = list(document.values())
    wrapped = [key for key, value in document.items() if _is_list_of(value, Mapping)]
    if len(wrapped) == 1:
        return document[wrapped[0]]
    if wrapped:
        raise ValueError(
            f"{path}: the file holds several lists ({', '.join(wrapped)}); write each to a file of its own"
        )
    if {"columns", "data"} <= document.keys() or (values and all(isinstance(value, Mapping) for value in values)):
        raise ValueError(f"{path}: the file holds columns with an index ({', '.join(document)}): {_AS_RECORDS}")
    if values and all(isinstance(value, list) for value in values):
        lengths = {key: len(value) for key, value in document.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{path}: the columns differ in length: {lengths}; {_AS_RECORDS}")
        return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    return [document]


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


# ---- csv ------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, encoding: str) -> Iterator[Record]:
    """The lines under a header, as text. The header says whether commas, semicolons or tabs stand between columns."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # else a text of more than 128 KiB is an error
    delimiter = _delimiter(path, encoding)
    with text_files.open_text(path, encoding, newline="") as text:
        lines = _csv_lines(path, text, delimiter)
        _, header = next(lines)
        names = [name.strip() for name in header]
        twice = sorted({name for name in names if name and names.count(name) > 1})
        if twice:
            raise ValueError(f"{path}: the header names {', '.join(twice)} twice; rename or remove one of them")
        for index, (number, values) in enumerate(lines):
            record = _csv_record(f"{path}: row {index} (line {number})", names, values, delimiter)
            yield Record(record, number, "; a csv file names its columns in its first line")


def _csv_record(where: str, names: list[str], values: list[str], delimiter: str) -> dict[str, str]:
    more = values[len(names) :]
    if any(more) or len(values) < len(names):
        raise ValueError(
            f"{where} has {len(values)} columns where the header names {len(names)} ({', '.join(names)}); a text that "
            f"holds {_DELIMITERS[delimiter]} or line breaks must stand in double quotes"
        )
    # An index that pandas has written stands under no name.
    return {name: value for name, value in zip(names, values, strict=False) if name}


def _csv_lines(path: Path, text: IO[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Every line that is not empty, with the number of the line that it begins in."""
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"{path}: not readable as csv: the row that begins in line {number}: {error}; a quoted text must end "
                'with a double quote, and a double quote within it is written twice ("")'
            ) from error
        if values:
            yield number, values


def _delimiter(path: Path, encoding: str) -> str:
    """What parts the header into most columns; what the ending says where that leaves it open."""
    usual = ["\t", ",", ";"] if ".tsv" in text_files.split_name(path)[1] else [",", ";", "\t"]
    parts = {}
    for delimiter in usual:
        with text_files.open_text(path, encoding, newline="") as text:
            try:
                header = next(_csv_lines(path, text, delimiter), None)
            except ValueError:
                continue  # with this delimiter its quotes do not fit; if with none, the usual one tells why
        if header is None:
            raise ValueError(f"{path}: the file holds no rows")
        parts[delimiter] = len(header[1])
    return max(parts, key=lambda delimiter: parts[delimiter], default=usual[0])


# ---- parquet and datasets -------------------------------------------------------------------------------------------


def _read_parquet(path: Path, used: Collection[str] | None) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{path}: the file has two columns named {', '.join(twice)}; rename one of them")
            known = [name for name in names if used is None or name in used]
            if not known:
                yield of_table({}, names)
                return
            for batch in file.iter_batches(batch_size=1000, columns=known):
                for values in batch.to_pylist():
                    yield of_table(values, names)
    except (pa.ArrowException, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as parquet: {str(error).splitlines()[0]}") from error


def of_table(values: Mapping[str, Any], names: Iterable[str]) -> Record:
    """The record of a row of an Arrow table, without the nulls inside its values that fill up keys of other rows.

    Args:
        names: of all columns; those that were not read are there, for messages, but hold no value of use.
    """
    read = {key: _without_nulls(value) for key, value in values.items()}
    return Record(dict.fromkeys(names, "(not read)") | read)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# ---- words for messages ---------------------------------------------------------------------------------------------


_TYPES = {str: "a text", bool: "true or false", type(None): "null", bytes: "bytes", dict: "an object", list: "a list"}


def name_of_type(value: Any) -> str:
    """What a value is, in words of the file."""
    if isinstance(value, NotANumber) or (isinstance(value, float) and not math.isfinite(value)):
        return f"{value} (not a number)"
    if isinstance(value, (Number, int, float)) and not isinstance(value, bool):
        return "a number"
    return _TYPES.get(type(value), f"a value of type {type(value).__name__}")
