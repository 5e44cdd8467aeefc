"""Which task the rows allow: exact match, multiple choice, or only the loss."""

from __future__ import annotations

import re
from typing import NamedTuple

from launch import distributed
from launch.data.chat_template import Template
from launch.data.messages import Row, is_text
from launch.data.rows import Rows
from launch.evaluation.grading import is_answered, reference_answer, said_answers, words

TASKS = ("exact", "choice", "loss")
_OPTIONS = re.compile(r"Answer format:\s*(\S+(?:/\S+)+)")


class Detected(NamedTuple):
    """A task that rows allow: "exact", "choice" or "loss", and why it is no more than the loss ("" otherwise)."""

    task: str
    why: str


def options(row: Row) -> list[str]:
    """The choices of a row: its `choices`, or the list after "Answer format:" in its instruction; [] if none."""
    if row.get("choices"):
        return [str(choice) for choice in row["choices"]]
    found = _OPTIONS.search(str(row.get("instruction") or ""))
    return found.group(1).split("/") if found else []


def right_option(row: Row) -> int | None:
    """The index of the option that the row's answer names; None without options, or if it names none or several.

    "(B) gold" names the option "B", or else the option "gold".
    """
    names, answer = options(row), reference_answer(row)
    if len(names) < 2 or answer is None or is_text(row):
        return None
    if answer in names:
        return names.index(answer)
    alike = [index for index, name in enumerate(names) if words(name) == words(answer)]
    if not alike:
        said = said_answers(answer)
        alike = [index for index, name in enumerate(names) if words(name) in said]
    return alike[0] if len(alike) == 1 else None


def choose_task(wanted: str, rows: Rows) -> str:
    """The task to measure; "auto" is what all rows allow, and rank 0 says why that is no more than the loss.

    Raises:
        ValueError: a row that the wanted task cannot be measured on.
    """
    if wanted != "auto":
        check_task(wanted, rows)
        return wanted
    task, why = detect_task(rows)
    if why and distributed.rank() == 0:
        print(f"measuring the loss only: {why}", flush=True)
    return task


def detect_task(rows: Rows) -> Detected:
    """The task that all of the rows allow.

    A number somewhere in a row's output does not make it a row with an answer.
    """
    if all(right_option(row) is not None for row in rows.rows):
        return Detected("choice", "")
    without = [index for index, row in enumerate(rows.rows) if not is_answered(row)]
    if not without:
        return Detected("exact", "")
    answered = len(rows) - len(without)
    why = (
        f'{answered} of {len(rows)} rows have an `answer`, or an output that says "The answer is ..." '
        f"(the first without: {rows.where(without[0])})"
    )
    return Detected("loss", why)


def check_task(task: str, rows: Rows) -> None:
    """Refuse rows that a task cannot be measured on.

    Raises:
        ValueError: naming the source and the row.
    """
    for index, row in enumerate(rows.rows):
        where = rows.where(index)
        if task in ("exact", "choice") and is_text(row):
            raise ValueError(
                f"{where} is plain `text`, without a prompt to answer: task {task} cannot measure it; use loss"
            )
        if task == "exact" and reference_answer(row) is None:
            raise ValueError(
                f"{where} has no `answer` to compare with: give the rows an `answer`, or measure the loss (task loss)"
            )
        if task == "choice" and right_option(row) is None:
            raise ValueError(
                f"{where} has no options with its answer {reference_answer(row)!r} among them: {options(row)}; give "
                'the rows `choices` or "Answer format: a/b" and an `answer`, or choose another task'
            )


def largest_token_read(template: Template, rows: Rows, task: str) -> int:
    """The largest token of the prompts that a task reads besides the rows' tokens; 0 if it reads none.

    Raises:
        ValueError: a row that the template refuses; the source and the row are named.
    """
    if task not in ("exact", "choice"):
        return 0
    return max(rows.each(lambda row: max(template.prompt_ids(row))))
