from typing import Any

import datasets
import pytest

from launch.arithmetic import generate
from launch.grading import detect_task, extract_number, is_correct, options, reference_answer
from launch.rows import Rows


def in_memory(rows: list[dict[str, Any]]) -> Rows:
    return Rows("memory", datasets.Dataset.from_list(rows))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 12.", 12),
        ("The answer is 12.5.", 12.5),
        ("The answer is: $1,234.50 in all", 1234.5),
        ("The answer is -3", -3),
        ("The answer is 4. No, the answer is 5. Wait, 6", 5),
        ("so 3 + 4 = 7", 7),
        ("The answer is unknown", None),
        ("nothing", None),
    ],
)
def test_extract_number(text: str, number: float | None) -> None:
    assert extract_number(text) == number


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The answer is 30.", "30.0", True),
        ("The answer is 30.", "31", False),
        ("The answer is 9.8.", "9.8", True),
        ("no number", "3", False),
        ("the correct answer is answer3", "answer3", True),
        ("the correct answer is answer2.", "answer3", False),
        ("The answer is True.", "true", True),
        ("", "true", False),
    ],
)
def test_is_correct(text: str, reference: str, right: bool) -> None:
    assert is_correct(text, reference) is right


ARC = {
    "instruction": "Choose: what is wet?\n\nAnswer1: fire Answer2: water\n\nAnswer format: answer1/answer2",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def test_options_and_task() -> None:
    assert options(ARC) == ["answer1", "answer2"]
    assert options({**ARC, "choices": ["a", "b", "c"]}) == ["a", "b", "c"]
    assert options({"instruction": "What?"}) == []
    assert detect_task(in_memory([ARC])) == "choice"
    assert detect_task(in_memory(generate("test", 2))) == "exact"
    assert detect_task(in_memory([{"text": "prose 3"}])) is None
    assert reference_answer({"instruction": "q", "output": "It is so. The answer is 7."}) == "7"
