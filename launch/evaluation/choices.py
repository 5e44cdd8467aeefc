"""The texts that a multiple-choice row is measured by: its own answer, with each option in the place of the right one.

An option is measured as the row's answer words it ("The answer is (B)."): that is what training has taught, and a bare
"B" right behind the prompt is not. Nothing before the option may give it away. Of an output that reasons about the
options first, only the sentence that marks the answer is kept; of one that marks none, nothing is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from launch.data.messages import Row, conversation
from launch.evaluation.grading import last_mark
from launch.evaluation.tasks import options, right_option

_SENTENCE_START = re.compile(r"(?:[.!?]\s|\n)\s*")
_LABEL = re.compile(r"(?<!\w)([A-Za-z])([).:]\s*)$")


def candidate_texts(row: Row) -> tuple[list[str], int]:
    """The answer of every option up to the option's end, and the index of the right one, see `right_option`."""
    names, right = options(row), right_option(row)
    assert right is not None, "see check_task"
    opening = _opening(str(conversation(row)[-1]["content"]), names, right)
    return [_labelled(opening, right, index) + name for index, name in enumerate(names)], right


def _opening(output: str, names: Sequence[str], right: int) -> str:
    """What an output says before it names the right option; "" if it does not, or not without reasoning."""
    mark = last_mark(output)
    found = _naming(names[right], output, 0 if mark is None else mark.end())
    if found is None:
        return ""
    opening = output[: found.start()]
    if not _gives_away(names, opening):
        return opening
    if mark is None:
        return ""
    starts = [start.end() for start in _SENTENCE_START.finditer(opening, 0, mark.start())]
    sentence = opening[starts[-1] if starts else 0 :]
    return "" if _gives_away(names, sentence) else sentence


def _gives_away(names: Sequence[str], text: str) -> bool:
    """Whether a text names an option. An "a" is no option "A"."""
    return any((found := _naming(name, text)) and (len(name) > 1 or found.group() == name) for name in names)


def _naming(name: str, text: str, start: int = 0) -> re.Match[str] | None:
    """Where a text names an option: as it is written, or else in other letter case."""
    whole = rf"(?<!\w){re.escape(name)}(?!\w)"
    found = re.compile(whole).search(text, start)
    return found or re.compile(whole, re.IGNORECASE).search(text, start)


def _labelled(opening: str, right: int, index: int) -> str:
    """An opening that ends with the right option's letter ("(B) ") with another option's letter; without any other."""
    label = _LABEL.search(opening)
    if label is None:
        return opening
    first = ord("a" if label[1].islower() else "A")
    if ord(label[1]) - first != right:
        return opening[: label.start()].removesuffix("(")
    return f"{opening[: label.start()]}{chr(first + index)}{label[2]}"
