# SPDX-License-Identifier: Apache-2.0
"""The quality suite: which learning rates are tried, which cases follow, and the figures of its tables."""

from typing import Any

import pytest
from helpers.markdown import lines_of, lines_under

from benchmarks import cost_model
from benchmarks.case import Request
from benchmarks.quality import suite, tables
from benchmarks.quality.suite import COMPARED, GRID, RATES, SETTINGS, STEPS, TUNING_SEED
from benchmarks.tasks import TASKS, Exam
from launch.data.chat_template import Template
from launch.model import load_tokenizer

TASK = "arithmetic"


def row(method: str, lr: float, seed: int, dev_loss: float, **changed: Any) -> dict[str, Any]:
    """A row as far as this suite reads it."""
    case = {"kind": "quality", "task": TASK, "method": method, "lr": lr, "seed": seed, "steps": STEPS}
    batch = {"dtype": "bf16", "ranks": 1, "micro_batch": 2, "sequence": 16, "grass": SETTINGS, "model": "any"}
    machine = {"device": "cpu", "hardware": "any", "threads": 1, "jobs": 1, "commit": "0a", "versions": {"torch": "2"}}
    found = {"dev_loss": dev_loss, "dev_rows": 8, "test_rows": 8, "data": "0a"}
    return {**case, **batch, **machine, **found, **changed}


def tuned(method: str, losses: dict[float, float]) -> list[dict[str, Any]]:
    return [row(method, lr, TUNING_SEED, loss) for lr, loss in losses.items()]


def reached(method: str, seed: int, loss: float, accuracy: float, **changed: Any) -> dict[str, Any]:
    measured = {"test_loss": loss, "accuracy": {"one": accuracy, "two": accuracy}, "cpu_seconds": 100.0}
    return row(method, 1e-4, seed, loss, **measured, peak_bytes=2e9, trainable=7_000_000, **changed)


@pytest.mark.parametrize(
    ("losses", "left"),
    [
        ({}, [*GRID]),
        ({GRID[0]: 1.0}, [*GRID[1:]]),
        (dict(zip(GRID, (2.0, 1.0, 3.0), strict=True)), []),
        (dict(zip(GRID, (1.0, 2.0, 3.0), strict=True)), [RATES[0]]),
        (dict(zip(GRID, (3.0, 2.0, 1.0), strict=True)), [RATES[4]]),
        (dict(zip(RATES[1:], (3.0, 2.0, 1.0, 0.5), strict=True)), []),  # beyond the last there is none
    ],
)
def test_rates_are_tried_until_the_best_has_worse_neighbours(losses: dict[float, float], left: list[float]) -> None:
    assert suite.untried_rates(losses) == left
    best = suite.best_rates(TASK, tuned("grass", losses))
    assert ("grass" in best) == (losses != {} and not left)


def cases(parts: list[str], rows: list[dict[str, Any]]) -> list[Any]:
    return list(suite.cases(Request(parts=tuple(parts), tasks=(TASK,), rows=rows)))


def test_methods_are_compared_once_their_rate_is_known() -> None:
    rows = tuned("grass", dict(zip(GRID, (2.0, 1.0, 3.0), strict=True))) + tuned("full", {GRID[0]: 1.0})
    untrained, *found = cases(["compare"], rows)
    assert (untrained.method, untrained.steps) == ("full", 0)
    assert {(case.method, case.lr) for case in found} == {("grass", GRID[1])}
    assert [case.seed for case in found if case.curve] == [*suite.SEEDS]
    assert TUNING_SEED not in suite.SEEDS
    assert {(case.method, case.lr) for case in cases(["tune"], [])} == {(m, lr) for m in COMPARED for lr in GRID}


def test_differences_are_within_a_seed() -> None:
    rows = [
        reached("grass", 0, 1.0, 0.5),
        reached("uniform", 0, 1.5, 0.25),
        reached("grass", 1, 3.0, 0.5),
        reached("uniform", 1, 2.0, 0.75),
        reached("uniform", 2, 9.0, 0.0),  # without its pair
    ]
    loss, accuracy = (lines_of(text) for text in tables.pair_tables(rows))
    assert [list(line.values()) for line in loss] == [
        # 12.71 * 1.061 / sqrt(2) to both sides
        ["grass - uniform", "+0.250 ± 1.061", "-0.500, +1.000", "-9.282 to +9.782"]
    ]
    assert [list(line.values())[:3] for line in accuracy] == [["grass - uniform", "+0.000 ± 0.354", "+0.250, -0.250"]]


def test_seconds_of_another_day_are_left_out() -> None:
    for commit, seconds in (("0a", "2.00"), ("another", "")):
        rows = [reached("grass", 0, 1.0, 0.5), reached("full", 0, 0.5, 0.5, commit=commit)]
        cost = lines_under("Cost of the runs", tables.result_tables(rows))
        assert [line["CPU s / step"] for line in cost] == [seconds, "2.00"]


def test_results_list_what_the_untrained_and_the_constant_reach() -> None:
    constant = {"constant": {"one": 0.25, "two": 0.75}}
    rows = [
        reached("full", 0, 4.0, 0.25, steps=0),
        reached("grass", 0, 1.0, 0.5, **constant),
        reached("grass", 1, 3.0, 0.5),
    ]
    losses, accuracy, cost = (lines_of(text) for text in tables.result_tables(rows))
    assert [list(line.values()) for line in losses] == [
        ["(untrained)", "", "4.000", "4.000", "1"],
        ["grass", "0.0001", "2.000 ± 1.414", "2.000 ± 1.414", "2"],
    ]
    assert [list(line.values())[:2] for line in accuracy] == [
        ["(untrained)", "0.250"],
        ["(most frequent answer)", "0.500"],
        ["grass", "0.500 ± 0.000"],
    ]
    assert [list(line.values())[:4] for line in cost] == [["grass", "2.00", "2.00", "7.0"]]


def test_the_best_rate_is_bold_once_no_other_is_to_be_tried() -> None:
    known = tuned("grass", dict(zip(GRID, (2.0, 1.0, 3.0), strict=True)))
    full, grass = lines_of(tables.rate_table(TASK, [*known, *tuned("full", {GRID[0]: 1.0})]))
    assert grass["0.0002"] == "**1.000**"
    assert full["5e-05"] == "1.000"


def test_rows_that_choose_settings_are_not_those_that_are_reported() -> None:
    exam = Exam(TASKS["builtin"], Template.choose(load_tokenizer()), None, rows=6)
    dev, test, train = ([tuple(one["input_ids"]) for one in rows] for rows in (exam.dev, exam.test, exam.train))
    assert len(dev) == len(test) == 6
    assert not set(dev) & set(test) and not set(train) & {*dev, *test}
    answered = exam._tokens(exam._unseen("builtin:arithmetic"))
    assert [tuple(one["input_ids"]) for one in answered] == test[:3]
    first, again = ([next(batches) for _ in range(3)] for batches in (exam.batches(1), exam.batches(1)))
    assert first == again != [next(exam.batches(2)) for _ in range(3)]


def test_rows_of_options_that_are_gone_still_have_a_cost() -> None:
    shape = {"layers": 4, "tied": False}
    old = row("grass", 1e-4, 0, 1.0, grass={**SETTINGS, "an_option_of_old": 1}, stage=2, offload=None, shape=shape)
    block = cost_model.TrainedStep(old, [0]).grass
    assert block is not None and block.sample_period == SETTINGS["sample_period"]
