"""Open a data file as text: its format by its ending, its compression and byte order by its first bytes."""

from __future__ import annotations

import codecs
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

UTF8 = "utf-8"
FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
JSON_LINES = (".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
# UTF-32's mark begins with UTF-16's, so it comes first.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_CHUNK = 1 << 20


def split_name(path: Path) -> tuple[str, str]:
    """The name without its ending, and the ending in lower case with that of the compression: "rows", ".jsonl.gz"."""
    compression = path.suffix if path.suffix.lower() in COMPRESSIONS else ""
    name = path.name[: len(path.name) - len(compression)]
    ending = Path(name).suffix
    return name[: len(name) - len(ending)], (ending + compression).lower()


def format_of(path: Path) -> str | None:
    """ "json", "csv" or "parquet"; None for a file that holds no rows as far as its name says."""
    unpacked = _unpacked_ending(path)
    kind = FORMATS.get(unpacked)
    return None if kind == "parquet" and unpacked != split_name(path)[1] else kind


def is_json_lines(path: Path) -> bool:
    """Whether the name says that each line is a row."""
    return _unpacked_ending(path) in JSON_LINES


def _unpacked_ending(path: Path) -> str:
    ending = split_name(path)[1]
    return next((ending.removesuffix(packed) for packed in COMPRESSIONS if ending.endswith(packed)), ending)


def readable_endings() -> str:
    """For messages: every ending that can be read."""
    return f"{', '.join(FORMATS)} (all but .parquet also with {' or '.join(COMPRESSIONS)})"


def check_encoding(encoding: str) -> None:
    """Refuse a name that Python knows no text encoding of.

    Raises:
        ValueError: with names that are known.
    """
    try:
        "a".encode(encoding)
    except LookupError as error:
        raise ValueError(
            f"--encoding {encoding!r}: no such text encoding; use for example utf-8, utf-16, latin-1 or cp1252"
        ) from error


@contextlib.contextmanager
def open_text(path: Path, encoding: str, newline: str | None = None) -> Iterator[IO[str]]:
    """The text of a file. A byte order mark at its start overrules `encoding`.

    Raises:
        ValueError: (also while the text is read) bytes that are not text in this encoding; a broken archive.
    """
    check_encoding(encoding)
    with _refusing_broken_archives(path), _open_bytes(path) as stream:
        head = _head(path)
        marked = next((found for mark, found in _MARKS.items() if head.startswith(mark)), None)
        encoding = marked or encoding
        if b"\0" in head and codecs.lookup(encoding).name == "utf-8":
            raise ValueError(
                f"{path}: not text in utf-8, since it holds zero bytes; if it is UTF-16, say --encoding utf-16-le or "
                "--encoding utf-16-be"
            )
        try:
            yield io.TextIOWrapper(stream, encoding=encoding, newline=newline)
        except UnicodeError as error:
            reason = getattr(error, "reason", error)
            remedy = "its byte order mark says this encoding: write the file again" if marked else _remedy(encoding)
            raise ValueError(
                f"{path}: not text in {encoding}{_location_of_the_fault(path, encoding)}: {reason}; {remedy}"
            ) from error


def _remedy(encoding: str) -> str:
    """What to use in place of an encoding that does not fit."""
    used = codecs.lookup(encoding).name
    if used in ("utf-16", "utf-32"):
        # Without a byte order mark, which these two expect, the order must be named.
        others = [f"{used}-le", f"{used}-be"]
    else:
        others = [name for name in ("latin-1", "cp1252", "utf-16", UTF8) if codecs.lookup(name).name != used][:3]
    return f"say how the file is encoded with --encoding, for example {', '.join(others[:-1])} or {others[-1]}"


def _head(path: Path) -> bytes:
    with _open_bytes(path) as stream:
        return stream.read(4096)


def _open_bytes(path: Path) -> IO[bytes]:
    """The bytes of a file, decompressed if its first bytes say that it is compressed, whatever it is called."""
    with path.open("rb") as file:
        head = file.read(4)
    compression = next((name for mark, name in _COMPRESSED.items() if head.startswith(mark)), None)
    if compression is None:
        return path.open("rb")
    if not pa.Codec.is_available(compression):
        raise ValueError(f"{path}: this pyarrow cannot read {compression}; unpack the file first")
    return io.BufferedReader(pa.input_stream(str(path), compression=compression), _CHUNK)


@contextlib.contextmanager
def _refusing_broken_archives(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise  # the system's, and it names the file
        raise ValueError(
            f"{path}: the compressed file is broken or cut off: {error}; copy or pack it again"
        ) from error


def _location_of_the_fault(path: Path, encoding: str) -> str:
    """Which line holds bytes that are not text; "" for encodings whose line breaks are not one byte."""
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig", "ascii"):
        return ""
    with _open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode(UTF8 if encoding == "utf-8-sig" else encoding)
            except UnicodeDecodeError as error:
                return f" (line {number}, byte 0x{line[error.start]:02x} after {error.start} others)"
    return ""
