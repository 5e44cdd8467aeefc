# SPDX-License-Identifier: Apache-2.0
"""The quality suite: which learning rates are tried, which cases follow, and the figures of its tables."""

import copy
import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.markdown import lines_of, lines_under
from helpers.models import tiny_llama

from benchmarks import cost_model
from benchmarks.cost_model import TrainedStep
from benchmarks.quality import (
    comparisons,
    equal_budget,
    layer_ablation,
    layer_tables,
    plots,
    scores,
    staleness,
    suite,
    tables,
)
from benchmarks.quality.suite import COMPARED, GRID, RATES, SETTINGS, STEPS, TUNING_SEED
from benchmarks.suite import Request
from benchmarks.tasks import TASKS, Exam
from launch.data.chat_template import Template
from launch.model import load_tokenizer

TASK = "arithmetic"


def row(method: str, lr: float, seed: int, dev_loss: float, **changed: Any) -> dict[str, Any]:
    """A row as far as this suite reads it."""
    return {
        "kind": "quality",
        "dtype": "bf16",
        "jobs": 1,
        "task": TASK,
        "method": method,
        "lr": lr,
        "seed": seed,
        "dev_loss": dev_loss,
        "steps": STEPS,
        "grass": SETTINGS,
        "model": "any",
        "ranks": 1,
        "micro_batch": 2,
        "sequence": 16,
        "dev_rows": 8,
        "test_rows": 8,
        "versions": {"torch": "2"},
        "device": "cpu",
        "hardware": "any",
        "threads": 1,
        "data": "0a",
        "commit": "0123abc",
        "batches": [[2, 8]] * STEPS,
        "active": [],
        **changed,
    }


@pytest.fixture
def known_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token that a batch holds costs 1e12, and twice that while all layers are measured."""
    monkeypatch.setattr(
        cost_model, "flops", lambda row, active: row["micro_batch"] * row["sequence"] * 10**12 * (1 + (active is None))
    )


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
    assert {case.method for case in cases(["redraw"], rows)} == {"grass"}
    rates = tuned("uniform", dict(zip(RATES[2:], (2.0, 1.0, 3.0), strict=True))) + tuned("uniform", {GRID[0]: 9.0})
    redraws = cases(["redraw"], rows + rates)
    assert {(case.method, case.lr) for case in redraws} == {("grass", GRID[1]), ("uniform", RATES[3])}
    assert {(case.seed, case.grass["seed"]) for case in redraws} == {(0, 100), (0, 200), (1, 101), (1, 201)}
    found = cases(["compare", "ablate", "redraw", "reprobe"], rows)
    assert {(case.method, case.lr) for case in found if case.steps} == {("grass", GRID[1])}
    assert [case.seed for case in found if case.curve] == [*suite.SEEDS]
    assert TUNING_SEED not in suite.SEEDS
    assert len([case for case in found if case.grass not in ({}, SETTINGS)]) == len(suite.ABLATION_SEEDS) * (
        len(suite.CHANGES) + len(suite.OTHER_DRAWS) + len(suite.REPROBE_PERIODS) - 1
    )
    assert [staleness.reprobe_period(vars(case)) for case in found if case.reprobe] == 2 * [*suite.REPROBE_PERIODS]
    assert [case.steps for case in found].count(suite.FEWER) == len(suite.ABLATION_SEEDS)
    assert {(case.method, case.lr) for case in cases(["tune"], [])} == {(m, lr) for m in COMPARED for lr in GRID}
    long = cases(["long"], [*tuned("full", dict(zip(GRID, (2.0, 1.0, 3.0), strict=True))), *rows[:3]])
    assert [(case.method, case.seed) for case in long] == [("full", 0), ("grass", 0), ("grass", 1), ("grass", 2)]
    assert {(case.lr, case.steps) for case in long} == {(GRID[1], suite.LONG)}


def test_differences_are_within_a_seed() -> None:
    rows = [
        reached("grass", 0, 1.0, 0.5),
        reached("uniform", 0, 1.5, 0.25),
        reached("grass", 1, 3.0, 0.5),
        reached("uniform", 1, 2.0, 0.75),
        reached("uniform", 2, 9.0, 0.0),  # without its pair
    ]
    loss, accuracy = (lines_of(text) for text in comparisons.pair_tables(rows))
    assert [list(line.values()) for line in loss] == [
        # 12.71 * 1.061 / sqrt(2) to both sides
        ["grass - uniform", "+0.250 ± 1.061", "-0.500, +1.000", "-9.282 to +9.782"]
    ]
    assert [list(line.values()) for line in accuracy] == [["grass - uniform", "+0.000 ± 0.354", "+0.250, -0.250"]]


@pytest.mark.usefixtures("known_flops")
def test_losses_are_compared_for_the_same_budget() -> None:
    steps, batches = 4, [[2, 8], [2, 8], [1, 4], [2, 8]]
    common = {"steps": steps, "batches": batches}
    seconds = (20.0, 30.0)
    curve = [
        {"step": step, "cpu_seconds": spent, "dev_loss": loss}
        for step, spent, loss in zip((2, 4), seconds, (2.0, 1.0), strict=True)
    ]
    frugal = reached("grass", 0, 1.0, 0.5, **common, active=[None, [0], [0], [1]], curve=curve)
    dear = reached("full", 0, 0.5, 0.5, **common, curve=[{**point, "cpu_seconds": 60.0} for point in curve[1:]])
    assert equal_budget.step_flops(frugal) == [32 * 10**12, 16 * 10**12, 4 * 10**12, 16 * 10**12]
    assert [point["tflop"] for point in equal_budget.points(frugal, 4.0)] == [0, 48, 68]
    assert equal_budget.points(frugal, None)[0]["step"] == 2
    table = [list(line.values())[1:] for line in lines_of(equal_budget.budget_table([frugal, dear], 4.0))]
    assert table == [
        # all of the frugal run: half of the dear one's 104 TFLOP, half of its seconds
        ["104", "60", "1.000", f"{4 - 3 * 68 / 104:.3f}", "2.500"],
        ["68", "30", "1.000", "1.000", "1.000"],
    ]
    assert equal_budget.loss_at(equal_budget.points(frugal, None), "step", 1) is None
    later = {**dear, "commit": "another"}  # of another day, on a machine of another speed
    uncompared, _ = lines_of(equal_budget.budget_table([frugal, later], 4.0))
    assert (uncompared["CPU s in all"], list(uncompared.values())[-1]) == ("", "")
    assert "CPU s" not in equal_budget.budget_table([dear], 4.0)  # before grass has run, nothing compares
    for other, seconds in ((dear, ["25.00", "25.00"]), (later, ["", "25.00"])):
        cost = lines_under("Cost of the runs", tables.result_tables([frugal, other]))
        assert [line["CPU s / step"] for line in cost] == seconds


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


@pytest.mark.usefixtures("known_flops")
def test_plots_show_what_there_is(tmp_path: Path) -> None:
    curve = [{"step": 10 * number, "cpu_seconds": 3.0 * number, "dev_loss": 1.0} for number in (1, 2)]
    active = [None, *([[0, 3]] * (STEPS - 1))]
    rows = [
        reached(method, 0, 1.0, 0.5, curve=curve, active=active, commit=commit)
        for method, commit in (("full", "an older one"), ("uniform", "0a"), ("grass", "0a"))
    ]
    figure = plots.loss_figure(TASK, rows, None)
    steps, *_, seconds = ({line.get_label(): line.get_color() for line in axes.lines} for axes in figure.axes)
    assert len(set(steps.values())) == 3  # a method has one colour in all panels
    assert seconds == {method: colour for method, colour in steps.items() if method != "full"}
    plots.draw(rows, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"loss-{TASK}.png", f"layers-{TASK}.png"}
    assert all(f"(plots/{path.name})" in "".join(tables.tables(rows)) for path in tmp_path.iterdir())


def test_other_draws_are_compared_draw_by_draw() -> None:
    redrawn = [
        row(method, 1e-4, 0, loss, grass={**SETTINGS, "seed": draw})
        for method, draw, loss in (
            ("uniform", 100, 2.0),
            ("uniform", 200, 3.0),
            ("grass", 100, 1.0),
            ("grass", 200, 4.0),
            ("grass", 300, 7.0),
        )
    ]
    losses, differences = (lines_of(text) for text in comparisons.redrawn_tables(redrawn))
    assert [list(line.values()) for line in losses] == [
        ["uniform", "2.500 ± 0.707", "2.500 ± 0.707", "2"],
        ["grass", "4.000 ± 3.000", "4.000 ± 3.000", "3"],
    ]
    assert [list(line.values()) for line in differences] == [  # the last draw has no pair
        ["seed 0", "+0.000 ± 1.414", "-1.000, +1.000", ""],
        ["all", "+0.000 ± 1.414", "", "-12.710 to +12.710"],
    ]


@pytest.mark.usefixtures("known_flops")
def test_changes_are_measured_against_all_draws_of_a_seed() -> None:
    """Loss 3 as it is and 1 with another draw: 2 on average."""
    redrawn = row("grass", 1e-4, 0, 1.0, grass={**SETTINGS, "seed": 100})
    other = row("grass", 1e-4, 1, 9.0, grass={**SETTINGS, "seed": 100})  # of a seed without a run as it is
    changed = row("grass", 1e-4, 0, 2.5, grass={**SETTINGS, "temperature": 4.0})
    runs = [reached("uniform", 0, 1.0, 0.5), reached("grass", 0, 3.0, 0.5)]
    fewer = row("grass", 1e-4, 0, 2.25, steps=40, batches=[[2, 8]] * 40)
    dropped = row("grass", 1e-4, 0, 1.5, grass={**SETTINGS, "an_option_of_old": 1})
    blocks = tables.tables([*runs, redrawn, other, changed, fewer, dropped])
    losses = lines_under("One setting of grass changed: development loss", blocks)
    assert [list(line.values()) for line in losses] == [
        ["nothing; its draws", "+0.000 ± 1.414", "+1.000, -1.000", "2"],
        ["`temperature` 4.0", "+0.500", "+0.500", "1"],
        ["`steps` 40", "+0.250", "+0.250", "1"],
        ["`an_option_of_old` 1", "-0.500", "-0.500", "1"],
    ]
    flops = lines_under("One setting of grass changed: cost and draws", blocks)
    assert [line["FLOPs, of unchanged"] for line in flops] == ["1.00", "1.00", "0.80", "1.00"]


@pytest.mark.usefixtures("known_flops")
def test_longer_runs_are_beside_the_short_one() -> None:
    points = [{"step": step, "cpu_seconds": 1.0, "dev_loss": loss} for step, loss in ((50, 0.8), (200, 0.7))]
    long = row("grass", 1e-4, 0, 0.7, steps=200, batches=[[2, 8]] * 200, curve=points, cpu_seconds=400.0)
    rows = [long, reached("grass", 0, 1.0, 0.5), reached("grass", 1, 9.0, 0.5)]
    blocks = tables.tables([*rows, {**long, "method": "uniform", "dev_loss": 0.5}])
    found = lines_under("Development loss along 200 steps", blocks)
    assert list(found[1].values()) == ["grass", "0", "0.0001", "0.800", "0.700", "1.000", "6400"]
    (difference,) = lines_under("Development loss after 200 steps: difference within a seed", blocks)
    assert list(difference.values()) == ["grass - uniform", "+0.200", "+0.200"]
    assert "for the same budget" not in "".join(blocks)  # long runs are no part of it


def test_rows_that_choose_settings_are_not_those_that_are_reported() -> None:
    exam = Exam(TASKS["builtin"], Template.choose(load_tokenizer()), None, rows=6)
    dev, test, train = ([tuple(one["input_ids"]) for one in rows] for rows in (exam.dev, exam.test, exam.train))
    assert len(dev) == len(test) == 6
    assert not set(dev) & set(test) and not set(train) & {*dev, *test}
    answered = exam._tokens(exam._unseen("builtin:arithmetic", 3))
    assert [tuple(one["input_ids"]) for one in answered] == test[:3]
    first, again = ([next(batches) for _ in range(3)] for batches in (exam.batches(1), exam.batches(1)))
    assert first == again != [next(exam.batches(2)) for _ in range(3)]


def test_scores_are_measured_anew_on_a_copy() -> None:
    model = tiny_llama(layers=2)
    ids = torch.randint(0, 50, (4, 1, 8))
    batches = [{"input_ids": row, "labels": row} for row in ids]
    reprobe = scores.ScoreProbe(model, batches)
    before = reprobe.measure(model)
    assert before == [scores.gradient_rms(copy.deepcopy(model), half) for half in (batches[:2], batches[2:])]
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    assert reprobe.measure(model) != before
    assert all(param.grad is None for param in model.parameters())


def test_staleness_compares_with_scores_measured_anew() -> None:
    assert staleness.rank_correlation([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]) == pytest.approx(1.0)
    assert staleness.rank_correlation([1.0, 2.0, 3.0], [9.0, 4.0, 2.0]) == pytest.approx(-1.0)
    points = [
        {"step": 4, "scores": [1.0, 2.0, 3.0], "true": [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]},
        {"step": 8, "scores": [3.0, 2.0, 1.0], "true": [[2.0, 2.0, 2.5], [1.0, 2.0, 2.5]]},
    ]
    active = [None] * 4 + [[1]] * 4
    measured = row("grass", 1e-3, 0, 1.0, reprobes=points, active=active)
    correlation, ratio = (lines_of(text) for text in staleness.staleness_tables([measured]))
    assert [list(line.values()) for line in correlation] == [
        ["0", "4", "1.00", "1.00", "1.00"],
        ["0", "8", "-1.00", "1.00", "1.00"],
    ]
    assert [list(line.values()) for line in ratio] == [
        ["0", "4", "0", "", "1.00, 1.00"],
        ["0", "8", "1", "1.00, 1.00", "0.40, 2.00"],  # 3, 2, 1 over 1.5, 2, 2.5, each divided by its mean, 2
    ]


def test_staleness_counts_layers_from_the_probing_that_scores_are_from() -> None:
    since = staleness.trained_since_probing
    active = [None, None, [0], [1], None, None, [2], [3]]
    assert since(active, 2) == set()
    assert since(active, 4) == {0, 1}
    assert since(active, 5) == {0, 1}  # the second probing is under way: the scores are the first one's
    assert since(active, 6) == set()
    assert since(active, 8) == {2, 3}


def test_staleness_keeps_settings_apart() -> None:
    points = [{"step": 4, "scores": [1.0, 2.0], "true": [[1.0, 2.0], [1.0, 2.0]]}]
    again = {**SETTINGS, "reprobe_period": 2}
    rows = [row("grass", 1e-3, 0, 1.0, reprobes=points, active=[None] * 4, grass=grass) for grass in (again, SETTINGS)]
    (correlation, _) = staleness.staleness_tables(rows)
    assert [line["`reprobe_period`"] for line in lines_of(correlation)] == ["0", "2"]


def test_the_ablation_trains_one_layer_at_a_time_from_the_same_weights() -> None:
    model = tiny_llama(layers=3)
    before = copy.deepcopy(model.state_dict())
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 50, (2, 2, 8))]
    seen: list[set[int]] = []

    def loss(trained: Any) -> float:
        """Which layers differ from the untrained ones."""
        moved = {
            name for name, weight in trained.state_dict().items() if not torch.equal(weight, before[name].float())
        }
        seen.append({int(name.split(".")[2]) for name in moved})
        return 10.0 - sum(2.0**layer for layer in seen[-1])

    found = layer_ablation.train_each_layer(model, batches, 1e-2, loss)
    assert seen == [set(), {0}, {1}, {2}]
    assert layer_tables.decreases(found) == [1.0, 2.0, 4.0]
    assert found["scores"] == scores.gradient_rms(copy.deepcopy(model).float(), batches)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.usefixtures("known_flops")
def test_the_ablation_says_what_each_draw_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_model, "flops", lambda row, active: 7 - active[0])
    found = {"steps": 5, "scores": [3.0, 1.0, 2.0], "before": 2.0, "losses": [1.0, 1.7, 1.4]}
    other = {**found, "losses": [1.8, 1.7, 1.4]}  # another layer is best
    rows = [row("grass", 1e-3, seed, 2.0, worth=worth) for seed, worth in enumerate((found, other))]
    brings, correlations = (lines_of(text) for text in layer_tables.layer_tables(rows))
    # ranks of the scores 2 0 1; of the decreases 2 0 1 and 0 1 2
    assert [line["correlation"] for line in correlations] == ["+0.25", "+1.00", "-0.50"]
    lines = {name: values for name, *values in (line.values() for line in brings)}
    assert lines["uniformly"] == ["0.5000", "1.00", "1.00", "1.00"]
    # layer 0 by the first, worth 0.2 by the second; layer 2 by the second, worth 0.6 by the first
    assert lines["largest loss decrease"] == ["0.4000", "0.80", "1.00", "0.80"]
    (cheap,) = [values for name, values in lines.items() if "over cost" in name]
    weights = [math.exp(score / 2.0) / cost**8 for score, cost in zip(found["scores"], (7, 6, 5), strict=True)]
    expected = [
        sum(map(operator.mul, weights, values)) / sum(weights) for values in ((1.0, 0.3, 0.6), (0.2, 0.3, 0.6))
    ]
    assert cheap[0] == f"{sum(expected) / 2:.4f}"
    weights = [math.exp(score / 2.0) for score in found["scores"]]
    expected = [
        sum(map(operator.mul, weights, values)) / sum(weights) for values in ((1.0, 0.3, 0.6), (0.2, 0.3, 0.6))
    ]
    assert lines["by gradient, temperature 1 (default)"][0] == f"{sum(expected) / 2:.4f}"


def test_rows_of_options_that_are_gone_still_have_a_cost() -> None:
    old = {**row("grass", 1e-4, 0, 1.0, grass={**SETTINGS, "an_option_of_old": 1}), "offload": None}
    assert TrainedStep(old, [0]).grass.sample_period == SETTINGS["sample_period"]


def test_draws_are_measured_by_what_importance_moves_and_by_what_they_share() -> None:
    skewed = row(
        "grass", 1e-3, 0, 1.0, scores=[{"probabilities": [0.7, 0.1, 0.1, 0.1]}, {"probabilities": [0.25] * 4}]
    )
    assert comparisons.distance_from_uniform(skewed) == pytest.approx(0.45 / 2)
    assert comparisons.distance_from_uniform(row("uniform", 1e-3, 0, 1.0, scores=[])) is None
    ours, theirs = (
        row("grass", 1e-3, 0, 1.0, active=active) for active in ([None, [0, 1], [2, 3]], [[0, 1], [0, 2], [2, 3]])
    )
    assert comparisons.shared_layers(ours, theirs) == 0.75  # of the two steps in which both train
    assert comparisons.shared_layers(ours, row("full", 1e-3, 0, 1.0)) is None
    assert comparisons.shared_layers({**ours, "active": ours["active"][:2]}, theirs) is None
