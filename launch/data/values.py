"""Values of a record as the text or the JSON that a row holds, or what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from launch.data.records import NotANumber, Number, name_of_type, parse_json


def as_text(value: Any, field: str) -> str | None:
    """A value as text; None for null.

    Raises:
        ValueError: a value that is no text, with its type and the remedy.
    """
    if value is None:
        return None
    if isinstance(value, str) and not isinstance(value, NotANumber):
        return _checked(str(value), field)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | Decimal) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, date) and not isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"has bytes in {field} that are not text in utf-8; write it as a string") from error
    advice = (
        "write null for nothing" if "not a number" in name_of_type(value) else "write it as the model should read it"
    )
    raise ValueError(f"has {name_of_type(value)} in {field} where a text belongs; {advice}")


def _checked(text: str, field: str) -> str:
    """Refuse half a character, which no tokenizer and no file can hold."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"has half a character ({half}, a surrogate without its pair) in {field}; the text was cut within an emoji "
            "or the like: mend or remove it"
        ) from error
    return text


def parsed(text: str, field: str) -> Any:
    """The value of JSON text, its numbers as the text holds them.

    Raises:
        ValueError: not JSON.
    """
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"has text in {field} that is not JSON ({error}); write it with json.dumps") from error


def plain(value: Any, where: str) -> Any:
    """A value whose numbers are numbers again: the arguments of a tool call keep their types.

    Raises:
        ValueError: what JSON does not have.
    """
    if isinstance(value, NotANumber) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"has {name_of_type(value)} in {where}; write null for nothing")
    if isinstance(value, Number):
        return json.loads(value)
    if isinstance(value, Mapping):
        return {_checked(str(key), where): plain(item, where) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item, where) for item in value]
    return value if isinstance(value, bool | int | float | None) else as_text(value, where)
