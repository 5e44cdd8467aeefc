import re

import pytest

from launch.data.arithmetic import KINDS, TEMPLATES, generate


def skeleton(text: str) -> str:
    """A template or a story without what may differ between two stories of one template: names, things, numbers."""
    return re.sub(r"\s+", " ", re.sub(r"\{\w+\}|\d+", "#", text)).strip().lower()


def test_train_and_test_share_no_template() -> None:
    assert TEMPLATES["train"].keys() == TEMPLATES["test"].keys() == KINDS.keys()
    train = {skeleton(template) for templates in TEMPLATES["train"].values() for template in templates}
    test = {skeleton(template) for templates in TEMPLATES["test"].values() for template in templates}
    assert len(train) == sum(map(len, TEMPLATES["train"].values()))
    assert not train & test


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_worked_answer_is_right(split: str) -> None:
    for row in generate(split, 300, seed=3):
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = (-?\d+)", row["output"])
        assert len(steps) == 2
        for left, operator, right, result in steps:
            value = {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}[operator]
            assert value == int(result)
        assert steps[1][0] == steps[0][3]
        assert row["output"].endswith(f"The answer is {row['answer']}.")
        assert int(row["answer"]) == int(steps[1][3]) > 0
        numbers = [int(number) for number in re.findall(r"\d+", row["instruction"])]
        assert numbers == [int(steps[0][0]), int(steps[0][2]), int(steps[1][2])]


def test_rows_are_different_and_kinds_are_balanced() -> None:
    rows = generate("train", 500)
    asked = {row["instruction"] for row in rows}
    assert len(asked) == 500
    assert not asked & {row["instruction"] for row in generate("test", 400)}
    multiplications = sum(" * " in row["output"] for row in rows)
    assert multiplications == 200  # two of the five kinds


def test_same_seed_same_rows() -> None:
    assert generate("train", 50, seed=1) == generate("train", 50, seed=1)
    assert generate("train", 50, seed=1) != generate("train", 50, seed=2)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        generate("dev", 1)
    with pytest.raises(ValueError, match="at least 1 row"):
        generate("train", 0)
