# SPDX-License-Identifier: Apache-2.0
"""Suite ``frontier``: what is searched for, in which order; and the control without Adam."""

from typing import Any

import pytest
import torch
from helpers.markdown import lines_of

from benchmarks.case import Case, Request
from benchmarks.frontier import suite, tables
from benchmarks.frontier.suite import EXPANSIONS, RULE, SEARCHED, SEEDS, SETTLED, Plan, Setting, around
from benchmarks.measure.engine import build, random_steps
from benchmarks.models import load

EIGHT = Setting("uniform", 8)
RATE = RULE / 8


def row(one: Setting, lr: float, loss: float) -> dict[str, Any]:
    """A tuning row as far as this suite reads it."""
    case = one.case(lr, seed=suite.TUNING_SEED, tuning=True)
    return {"method": case.method, "grass": case.grass, "lr": lr, "seed": case.seed, "dev_loss": loss}


def searched(losses: dict[float, float], one: Setting = EIGHT) -> list[dict[str, Any]]:
    return [row(one, lr, loss) for lr, loss in losses.items()]


RATES = {RATE / 2: 2.0, RATE: 1.0, RATE * 2: 3.0}
COEFFICIENTS = [
    row(EIGHT._replace(expansion=value), RATE, loss) for value, loss in zip(EXPANSIONS, (3, 1, 2), strict=True)
]
BEST = EIGHT._replace(expansion=EXPANSIONS[1])


def new(rows: list[dict[str, Any]], one: Setting) -> list[tuple[Setting, float]]:
    """What is to be run of a setting and of those with expansion."""
    done = {(suite.setting(row), row["lr"]) for row in rows}
    plan = Plan(rows)
    assert len(set(plan.tuning)) == len(plan.tuning)
    return [found for found in plan.tuning if found[0][:2] == one[:2] and found not in done]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], [(EIGHT, lr) for lr in around(RATE)]),
        (searched({RATE / 2: 1.0, RATE: 2.0, RATE * 2: 3.0}), [(EIGHT, RATE / 4)]),
        (searched({RATE / 2: 3.0, RATE: 2.0, RATE * 2: 1.0}), [(EIGHT, RATE * 4)]),
        (searched(RATES), [(EIGHT._replace(expansion=value), RATE) for value in EXPANSIONS]),
        (searched(RATES) + COEFFICIENTS, [(BEST._replace(depth=0), RATE)]),
        (
            searched(RATES) + COEFFICIENTS + [row(BEST._replace(depth=0), RATE, 9)],
            [(BEST, RATE / 2), (BEST, RATE * 2)],
        ),
    ],
)
def test_one_thing_is_searched_for_after_another(rows: list[dict[str, Any]], expected: list[Any]) -> None:
    assert new(rows, EIGHT) == expected


def test_lines_have_an_order_whatever_that_of_the_rows() -> None:
    for rows in (COEFFICIENTS, COEFFICIENTS[::-1]):
        tuning = Plan(searched(RATES) + rows).tuning
        found = [
            one.expansion for one, _ in tuning if one.gamma == EIGHT.gamma and one.expansion and one.depth is None
        ]
        assert found == [*EXPANSIONS]


def test_a_settled_setting_runs_with_all_seeds() -> None:
    rows = searched(RATES) + COEFFICIENTS + [row(BEST._replace(depth=0), RATE, 9)]
    rows += searched({RATE / 2: 3.0, RATE * 2: 2.0}, BEST)
    settled = SETTLED | {EIGHT: RATE, BEST: RATE}
    assert Plan(rows).settled == settled
    runs = [case for case in suite.cases(Request(rows=rows)) if not case.tuning]
    said = [(case.seed, suite.setting({"method": case.method, "grass": case.grass}), case.lr) for case in runs]
    assert said == [(seed, one, lr) for seed in SEEDS for one, lr in settled.items()]
    (line,) = (line for line in lines_of(tables.rates(rows)) if (line["layers"], line["expansion"]) == ("8", "0.2"))
    assert (line["0.0001"], line["0.0002"], line["0.0004"]) == ("3.000", "**1.000**", "2.000")


def test_if_deeper_layers_gain_both_depths_run_with_all_seeds() -> None:
    deep = BEST._replace(depth=0)
    rows = searched(RATES) + COEFFICIENTS + [row(deep, RATE, 0.5)]
    assert {(BEST, RATE)} == {(one, lr) for one, lr in Plan(rows).settled.items() if one.expansion}
    rows += searched({RATE / 2: 3.0, RATE * 2: 2.0}, deep)
    assert {(BEST, RATE), (deep, RATE)} == {(one, lr) for one, lr in Plan(rows).settled.items() if one.expansion}


def test_the_coefficient_stays_within_its_range() -> None:
    rows = searched(RATES) + [row(EIGHT._replace(expansion=value), RATE, -value) for value in (*EXPANSIONS, 0.8)]
    assert [one.expansion for one, _ in new(rows, EIGHT)] == [0.8]


def test_few_layers_with_expansion_keep_their_rate() -> None:
    one = Setting("uniform", 4)
    rows = [row(one._replace(expansion=value), SETTLED[one], value) for value in (*EXPANSIONS, EXPANSIONS[0] / 2)]
    rows.append(row(one._replace(expansion=EXPANSIONS[0] / 4), SETTLED[one], 9))
    assert Plan(rows).settled[one._replace(expansion=EXPANSIONS[0] / 2)] == SETTLED[one]


def test_a_row_says_its_setting() -> None:
    for one in (*SETTLED, *SEARCHED, BEST, BEST._replace(depth=0)):
        case = one.case(1e-4)
        assert suite.setting({"method": case.method, "grass": case.grass}) == one


def one_step(lr: float) -> dict[str, float]:
    """Largest and least move of the weights of what moved, over lr."""
    case = Case(kind="cost", method="sign-sgd", lr=lr, dtype="fp32", sequence=8, grass={"num_active_layers": 6})
    engine, _ = build(case, load("llama-tiny-random", "fp32")[0])
    step = random_steps(case, engine)
    for _ in range(8):  # up to the full learning rate
        step()
    before = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    step()
    moves = {name: (weight.detach() - before[name]).abs() for name, weight in engine.module.named_parameters()}
    return {name: float(move.max()) / lr for name, move in moves.items()}


@pytest.mark.dist
def test_sign_sgd_moves_all_layers_by_the_learning_rate(one_rank: Any) -> None:
    torch.manual_seed(0)
    (moves,) = one_rank.run(one_step, lr=2.0**-10)
    trained = {name for name, move in moves.items() if move > 0}
    assert trained == {name for name in moves if ".layers." in name or name == "model.norm.weight"}
    # weights are below 2, so a sum is rounded by at most 2**-24
    assert [moves[name] for name in trained] == pytest.approx([1] * len(trained), abs=2.0**-24 * 2**10)
