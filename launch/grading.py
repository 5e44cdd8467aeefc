"""Grade answers: what a row expects, what a text says, and whether the two agree."""

from __future__ import annotations

import math
import re

from launch.rows import Rows
from launch.template import Row, conversation

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ANSWER_MARK = re.compile(r"answer is:?", re.IGNORECASE)
_OPTIONS = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)")


def final_part(text: str) -> str:
    """What follows the last "answer is", or the whole text."""
    marks = list(_ANSWER_MARK.finditer(text))
    return text[marks[-1].end() :] if marks else text


def extract_number(text: str) -> float | None:
    """The first number after the last "answer is"; without that phrase, the text's last number; None without any."""
    marked = _ANSWER_MARK.search(text) is not None
    numbers = _NUMBER.findall(final_part(text))
    if not numbers:
        return None
    return float((numbers[0] if marked else numbers[-1]).replace(",", ""))


def is_correct(generated: str, reference: str) -> bool:
    """Whether a text gives the reference: numbers by value, other answers as the first word after "answer is"."""
    expected = _as_number(reference)
    if expected is None:
        words = final_part(generated).split()
        return bool(words) and words[0].strip(".,:;'\"").lower() == reference.strip().lower()
    found = extract_number(generated)
    return found is not None and math.isclose(found, expected, rel_tol=1e-6, abs_tol=1e-3)


def _as_number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def reference_answer(row: Row) -> str | None:
    """The row's `answer`, or what its worked answer ends in; None for plain text and for answers that end in prose."""
    if row.get("answer") is not None:
        return str(row["answer"])
    if row.get("text") is not None:
        return None
    number = extract_number(conversation(row)[-1]["content"])
    return None if number is None else f"{number:g}"


def options(row: Row) -> list[str]:
    """The choices of a row: its `choices`, or the list after "Answer format:" in its instruction; [] if none."""
    if row.get("choices"):
        return [str(choice) for choice in row["choices"]]
    found = _OPTIONS.search(str(row.get("instruction") or ""))
    return found.group(1).split("/") if found else []


def detect_task(rows: Rows) -> str | None:
    """The task that the first row allows: "choice", "exact", or None (then only the loss can be measured)."""
    first = rows.rows[0]
    if options(first) and reference_answer(first) in options(first):
        return "choice"
    return "exact" if reference_answer(first) is not None else None
