# SPDX-License-Identifier: Apache-2.0
"""The quality suite: which learning rates are tried, which cells follow from them, and what its tables make of rows."""

import copy
import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama
from matplotlib.figure import Figure

from benchmarks import contest, curves, draws, floors, spending, staleness, standings, worth
from benchmarks.case import Case
from benchmarks.contest import GRID, METHODS, RATES, SETTINGS, STEPS, TUNING_SEED
from benchmarks.reached import reached_block
from benchmarks.run import run_cell
from benchmarks.tasks import TASKS, Exam
from launch.data.chat_template import Template
from launch.model import load_tokenizer

TASK = "arithmetic"


def row(method: str, lr: float, seed: int, dev_loss: float, **changed: Any) -> dict[str, Any]:
    """A row as a cell writes it, as far as this suite reads it."""
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
        "micro_batch": 2,
        "sequence": 16,
        "dev_rows": 8,
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
        floors, "flops", lambda row, active: row["micro_batch"] * row["sequence"] * 10**12 * (1 + (active is None))
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
    assert contest.untried_rates(losses) == left
    best = contest.best_rates(TASK, tuned("grass", losses))
    assert ("grass" in best) == (losses != {} and not left)


def test_methods_are_compared_once_their_rate_is_known() -> None:
    rows = tuned("grass", dict(zip(GRID, (2.0, 1.0, 3.0), strict=True))) + tuned("full", {GRID[0]: 1.0})
    assert {cell["method"] for cell in contest.contest_cells(["redraw"], [TASK], rows)} == {"grass"}
    rates = tuned("uniform", dict(zip(RATES[2:], (2.0, 1.0, 3.0), strict=True))) + tuned("uniform", {GRID[0]: 9.0})
    redraws = list(contest.contest_cells(["redraw"], [TASK], rows + rates))
    assert {(cell["method"], cell["lr"]) for cell in redraws} == {("grass", GRID[1]), ("uniform", RATES[3])}
    assert {(cell["seed"], cell["grass"]["seed"]) for cell in redraws} == {(0, 100), (0, 200), (1, 101), (1, 201)}
    cells = list(contest.contest_cells(["compare", "ablate", "redraw", "reprobe"], [TASK], rows))
    assert {cell["method"] for cell in cells if cell["steps"]} == {"grass"}
    assert {cell["lr"] for cell in cells if cell["steps"]} == {GRID[1]}
    assert [cell["seed"] for cell in cells if "curve" in cell] == [*contest.SEEDS]
    assert TUNING_SEED not in contest.SEEDS
    assert len([cell for cell in cells if cell["grass"] not in ({}, SETTINGS)]) == len(contest.ABLATION_SEEDS) * (
        len(contest.CHANGES) + len(contest.OTHER_DRAWS) + len(contest.REPROBE_PERIODS) - 1
    )
    assert [cell["grass"].get("reprobe_period", 0) for cell in cells if "reprobe" in cell] == 2 * [
        *contest.REPROBE_PERIODS
    ]
    assert [cell["steps"] for cell in cells].count(contest.FEWER) == len(contest.ABLATION_SEEDS)
    everything = list(contest.contest_cells(["tune"], [TASK], []))
    assert {(cell["method"], cell["lr"]) for cell in everything} == {(m, lr) for m in METHODS for lr in GRID}


def test_differences_are_within_a_seed() -> None:
    rows = [
        reached("grass", 0, 1.0, 0.5),
        reached("uniform", 0, 1.5, 0.25),
        reached("grass", 1, 3.0, 0.5),
        reached("uniform", 1, 2.0, 0.75),
        reached("uniform", 2, 9.0, 0.0),  # without its pair
    ]
    (line,) = standings._pairs_table(rows)[2:]
    assert line.split(" | ") == [
        "| grass - uniform",
        "+0.250 ± 1.061 (-0.500, +1.000)",
        "-9.282 to +9.782",  # 12.71 * 1.061 / sqrt(2) to both sides
        "+0.000 ± 0.354 (+0.250, -0.250)",
        "",  # no layers are known
        "2 |",
    ]


@pytest.mark.usefixtures("known_flops")
def test_losses_are_compared_at_the_same_spending() -> None:
    steps, batches = 4, [[2, 8], [2, 8], [1, 4], [2, 8]]
    common = {"steps": steps, "batches": batches}
    seconds = (20.0, 30.0)
    curve = [
        {"step": step, "cpu_seconds": spent, "dev_loss": loss}
        for step, spent, loss in zip((2, 4), seconds, (2.0, 1.0), strict=True)
    ]
    frugal = reached("grass", 0, 1.0, 0.5, **common, active=[None, [0], [0], [1]], curve=curve)
    dear = reached("full", 0, 0.5, 0.5, **common, curve=[{**point, "cpu_seconds": 60.0} for point in curve[1:]])
    assert spending.step_flops(frugal) == [32 * 10**12, 16 * 10**12, 4 * 10**12, 16 * 10**12]
    assert [point["tflop"] for point in spending.points(frugal, 4.0)] == [0, 48, 68]
    assert spending.points(frugal, None)[0]["step"] == 2
    table = [line.strip("| ").split(" | ") for line in spending.spending_table([frugal, dear], 4.0)[2:]]
    assert [line[1:] for line in table] == [
        # all of the frugal run: half of the dear one's 104 TFLOP, half of its seconds
        ["104", "60", "1.000", f"{4 - 3 * 68 / 104:.3f}", "2.500"],
        ["68", "30", "1.000", "1.000", "1.000"],
    ]
    assert spending.loss_at(spending.points(frugal, None), "step", 1) is None
    later = {**dear, "commit": "another"}  # of another day, on a machine of another speed
    uncompared, _ = spending.spending_table([frugal, later], 4.0)[2:]
    assert uncompared.split(" | ")[1:] == ["104", "", "1.000", f"{4 - 3 * 68 / 104:.3f}", " |"]
    times = [line.split(" | ")[7] for line in standings._standings_table([frugal, dear])[2:]]
    assert times == ["25.00", "25.00"]
    assert [line.split(" | ")[7] for line in standings._standings_table([frugal, later])[2:]] == ["", "25.00"]


@pytest.mark.usefixtures("known_flops")
def test_sections_show_what_there_is(tmp_path: Path) -> None:
    assert standings.sections([]) == []
    tuning = tuned("grass", dict(zip(GRID, (2.0, 1.0, 3.0), strict=True)))
    text = "\n".join(standings.sections(tuning))
    assert "| grass |  | 2.000 | **1.000** | 3.000 |  |" in text
    assert "What was reached" not in text
    curve = {"curve": [{"step": 10, "cpu_seconds": 3.0, "dev_loss": 1.0}], "active": [None, *([[0, 3]] * (STEPS - 1))]}
    changed = row("grass", 1e-4, 0, 0.75, grass={**SETTINGS, "temperature": 4.0})
    fewer = row("grass", 1e-4, 0, 1.25, steps=40, batches=[[2, 8]] * 40, active=[None, *([[0, 3]] * 39)])
    dropped = row("grass", 1e-4, 0, 1.5, grass={**SETTINGS, "an_option_of_old": 1})
    text = "\n".join(standings.sections([*tuning, reached("grass", 0, 1.0, 0.5, **curve), changed, fewer, dropped]))
    assert "| `steps` 40 | +0.250 (+0.250) | 0.80 |  |  | 1 |" in text
    assert "| `an_option_of_old` 1 | +0.500 (+0.500) | 1.96 |  |  | 1 |" in text
    assert "| 1.000 | 1.000 | 0.500 | 0.500 | 0.500 | 2.00 | 2.00 GB | 7.0 M |  | 1 |" in text
    assert "| `temperature` 4.0 | -0.250 (-0.250) | 1.96 |  |  | 1 |" in text
    images = {path.name for path in curves.draw([reached("grass", 0, 1.0, 0.5, **curve)], tmp_path)}
    alone = reached("full", 0, 1.0, 0.5, **{**curve, "active": []})  # before grass has run, times compare with nothing
    assert "CPU seconds" not in "".join(spending.spending_table([alone], 2.0))
    assert images == {f"loss-{TASK}.png", f"layers-{TASK}.png"}
    assert all(f"(plots/{name})" in text for name in images)


@pytest.mark.usefixtures("known_flops")
def test_a_method_has_one_colour_in_all_panels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    curve = [{"step": 10 * number, "cpu_seconds": 3.0 * number, "dev_loss": 1.0} for number in (1, 2)]
    rows = [
        reached(method, 0, 1.0, 0.5, curve=curve, active=[], commit=commit)
        for method, commit in (("full", "an older one"), ("uniform", "0a"), ("grass", "0a"))
    ]
    curves._losses(TASK, rows, None, tmp_path / "any.png")
    steps, *_, seconds = ({line.get_label(): line.get_color() for line in axes.lines} for axes in figures[0].axes)
    assert len(set(steps.values())) == 3
    assert seconds == {method: colour for method, colour in steps.items() if method != "full"}


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
    uniform, grass, both = standings._redrawn_table(redrawn)[2:]
    assert uniform == "| uniform | 2.500 ± 0.707 | 2.500 ± 0.707 |  | 2 |"
    assert grass == "| grass | 4.000 ± 3.000 | 4.000 ± 3.000 |  | 3 |"
    # the last draw has no pair
    each = "+0.000 ± 1.414 (-1.000, +1.000)"
    assert both == f"| grass - uniform | {each} | {each} | -12.710 to +12.710 | 2 |"


@pytest.mark.usefixtures("known_flops")
def test_changes_are_measured_against_all_draws_of_a_seed() -> None:
    """Loss 3 as it is and 1 with another draw: 2 on average."""
    redrawn = row("grass", 1e-4, 0, 1.0, grass={**SETTINGS, "seed": 100})
    other = row("grass", 1e-4, 1, 9.0, grass={**SETTINGS, "seed": 100})  # of a seed without a run as it is
    changed = row("grass", 1e-4, 0, 2.5, grass={**SETTINGS, "temperature": 4.0})
    runs = [reached("uniform", 0, 1.0, 0.5), reached("grass", 0, 3.0, 0.5)]
    text = standings.sections([*runs, redrawn, other, changed])
    assert "| nothing; its draws | +0.000 ± 1.414 (+1.000, -1.000) | 1.00 |  |  | 2 |" in text
    assert "| `temperature` 4.0 | +0.500 (+0.500) | 1.00 |  |  | 1 |" in text


def test_sources_have_their_share() -> None:
    counts = {"arc_easy": 1, "arc_challenge": 1, "boolq": 6}
    rows = [row("grass", 1e-4, 0, 1.0), row("grass", 1e-4, 1, 1.0, train_rows=counts)]
    assert standings._sources("choice", rows).endswith("arc_challenge (12% of the rows), boolq (75% of the rows)")
    assert standings._sources("choice", rows[:1]) == "arc_easy, arc_challenge, boolq"
    assert standings._sources(TASK, [row("grass", 1e-4, 0, 1.0, train_rows={"gsm8k": 7})]) == "gsm8k"


@pytest.mark.usefixtures("known_flops")
def test_longer_runs_are_beside_the_short_one() -> None:
    points = [{"step": step, "cpu_seconds": 1.0, "dev_loss": loss} for step, loss in ((50, 0.8), (200, 0.7))]
    long = row("grass", 1e-4, 0, 0.7, steps=200, batches=[[2, 8]] * 200, curve=points, cpu_seconds=400.0)
    rows = [long, reached("grass", 0, 1.0, 0.5), reached("grass", 1, 9.0, 0.5)]
    text = "\n".join(standings.sections(rows))
    assert "| **grass**, 2 layers + final norm | 0.0001 | 0.800 | 0.700 | 1.000 | 6400 | 0 |" in text
    assert "for the same spending" not in text  # the long run is not part of it
    assert "2 seeds" in text
    assert "At their end" not in text
    both = [long, {**long, "method": "uniform", "dev_loss": 0.5}]
    assert "At their end grass - uniform, within a seed: +0.200 (+0.200)." in "\n".join(
        standings.sections(rows + both)
    )
    rates = dict(zip(GRID, (2.0, 1.0, 3.0), strict=True))
    cells = list(contest.contest_cells(["long"], [TASK], [*tuned("full", rates), *tuned("grass", rates)]))
    assert [(cell["method"], cell["seed"]) for cell in cells] == [
        ("full", 0),
        ("grass", 0),
        ("grass", 1),
        ("grass", 2),
    ]
    assert {(cell["lr"], cell["steps"]) for cell in cells} == {(GRID[1], contest.LONG)}


def test_readme_quotes_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "flops", lambda row, active: 7 - active[0])
    worths = [
        {"steps": 5, "scores": [3.0, 1.0], "before": 2.0, "losses": [1.0, 1.5]},
        {"steps": 5, "scores": [3.0, 1.0], "before": 2.0, "losses": [1.5, 1.75]},
    ]
    rows = [
        reached("full", 0, 4.0, 0.25, steps=0),
        reached("uniform", 0, 1.5, 0.25),
        reached("uniform", 1, 2.0, 0.75),
        reached("grass", 0, 1.0, 0.5),
        reached("grass", 1, 3.0, 0.5),
        *tuned("grass", {GRID[0]: 9.0}),
        *(
            row(method, 1e-4, 0, loss, grass={**SETTINGS, "seed": seed})
            for method, losses in (("uniform", (2.0, 2.0)), ("grass", (2.5, 1.5)))
            for seed, loss in zip((100, 200), losses, strict=True)
        ),
        *(row("grass", 1e-4, seed, 2.0, steps=0, worth=found) for seed, found in enumerate(worths)),
    ]
    text = " ".join(reached_block(rows).split())
    assert "| (untrained) | 4.000 |" in text
    assert "| uniform (LISA's draw), 2 layers + final norm | 1.750 ± 0.354 |" in text
    assert "| **grass**, 2 layers + final norm | 2.000 ± 1.414 |" in text
    assert "2 seeds" in text
    assert "`grass` - `uniform`: +0.250 (95 % interval -9.282 to +9.782); with 2 further pairs" in text
    assert "on 1 of these seeds, development loss: +0.000 (95 % interval -6.355 to +6.355)." in text
    assert "by 0.562 if drawn uniformly" in text
    assert "by 0.750 if it is the one that was best with other batches" in text
    assert text.endswith("correlation of gradients with what layers bring: 1.00.")
    assert reached_block(tuned("grass", {GRID[0]: 9.0})) == ""


@pytest.mark.all  # most of a minute: cells of other suites run whole by default
@pytest.mark.dist
def test_a_quality_cell_trains_measures_and_is_shown(tmp_path: Path) -> None:
    """The whole of a cell: a tiny model on the built-in task; rank, engine, probing, drawing, every measure."""
    tokenizer = load_tokenizer()
    model = tiny_llama(layers=3)
    model.resize_token_embeddings(len(tokenizer))
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    cell = {
        **contest._cell("builtin", "grass", lr=1e-2, seed=0, curve=4, reprobe=4, worth=1),
        "model": str(tmp_path),
        "test-rows": 4,
        "steps": 8,
        "grass": {**SETTINGS, "sample_period": 2, "num_active_layers": 1},
    }
    found = run_cell(cell, "fp32", 300)
    assert found["active"][:4] == [None] * 4
    drawn = [layers for (layers,) in found["active"][4:]]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert len(found["train_losses"]) == len(found["batches"]) == 8
    assert found["tokens"] <= sum(rows * length for rows, length in found["batches"])
    probed, trained = found["curve"]
    assert (probed["step"], trained["step"]) == (4, 8)
    # Nothing has moved before the first point. In float32 only the sum over the vocabulary can round otherwise, by the unit roundoff per term.
    before = found["worth"]["before"]
    rounding = len(tokenizer) * torch.finfo(torch.float32).eps / 2 * before
    print(before, probed, trained, rounding)
    assert abs(probed["dev_loss"] - before) <= rounding < before - trained["dev_loss"]
    assert trained["dev_loss"] == found["dev_loss"] < probed["dev_loss"]
    assert found["test_loss"] > 0
    assert found["accuracy"].keys() == {"builtin:arithmetic"}
    assert [one["step"] for one in found["reprobes"]] == [4, 8]
    assert len(found["worth"]["losses"]) == 3
    exam = Exam(TASKS["builtin"], Template.choose(tokenizer), None, rows=4)
    assert found["data"] == exam.fingerprint()
    assert found["train_rows"] == {"builtin:arithmetic": len(exam.train)}
    assert found["bytes"]["optimizer_state"]["host"] > 0
    text = "\n".join(standings.sections([{**found, "commit": "0123abc", "jobs": 1}]))
    assert "## Quality: task `builtin`" in text
    assert "### Do scores go stale?" in text


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
    reprobe = staleness.Reprobe(model, batches)
    before = reprobe.measure(model)
    assert before == [staleness.gradient_rms(copy.deepcopy(model), half) for half in (batches[:2], batches[2:])]
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
    first, second = staleness.staleness_table([row("grass", 1e-3, 0, 1.0, reprobes=points, active=active)])[2:]
    assert first.strip("| ").split(" | ") == ["0", "4", "1.00", "1.00", "1.00", "0", "", "1.00, 1.00"]
    # 3, 2, 1 over 1.5, 2, 2.5, each divided by its mean, 2
    assert second.strip("| ").split(" | ") == ["0", "8", "-1.00", "1.00", "1.00", "1", "1.00, 1.00", "0.40, 2.00"]


def test_staleness_counts_layers_from_the_probing_that_scores_are_from() -> None:
    since = staleness._trained_since_probing
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
    assert [one.split(" | ")[0].strip("| ") for one in staleness.staleness_table(rows)[2:]] == ["0", "2"]


def test_worth_trains_one_layer_at_a_time_from_the_same_weights() -> None:
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

    found = worth.layer_worth(model, batches, 1e-2, loss)
    assert seen == [set(), {0}, {1}, {2}]
    assert worth.worths(found) == [1.0, 2.0, 4.0]
    assert found["scores"] == staleness.gradient_rms(copy.deepcopy(model).float(), batches)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.usefixtures("known_flops")
def test_worth_says_what_each_draw_brings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "flops", lambda row, active: 7 - active[0])
    found = {"steps": 5, "scores": [3.0, 1.0, 2.0], "before": 2.0, "losses": [1.0, 1.7, 1.4]}
    other = {**found, "losses": [1.8, 1.7, 1.4]}  # another layer is best
    rows = [row("grass", 1e-3, seed, 2.0, worth=worth) for seed, worth in enumerate((found, other))]
    note = worth.worth_note(rows)
    # ranks of the scores 2 0 1; of the worths 2 0 1 and 0 1 2
    assert "with their worth: +0.25; of two seeds' gradient RMS +1.00, of two seeds' worths -0.50" in note
    lines = {name: values for name, *values in (line.strip("| ").split(" | ") for line in worth.worth_table(rows)[2:])}
    assert lines["uniformly"] == ["0.5000", "1.00", "1.00", "1.00"]
    # layer 0 by the first, worth 0.2 by the second; layer 2 by the second, worth 0.6 by the first
    assert lines["the layer of largest worth"] == ["0.4000", "0.80", "1.00", "0.80"]
    (cheap,) = [values for name, values in lines.items() if "over the cost of the step" in name]
    weights = [math.exp(score / 2.0) / cost**8 for score, cost in zip(found["scores"], (7, 6, 5), strict=True)]
    brings = [sum(map(operator.mul, weights, values)) / sum(weights) for values in ((1.0, 0.3, 0.6), (0.2, 0.3, 0.6))]
    assert cheap[0] == f"{sum(brings) / 2:.4f}"
    weights = [math.exp(score / 2.0) for score in found["scores"]]
    brings = [sum(map(operator.mul, weights, values)) / sum(weights) for values in ((1.0, 0.3, 0.6), (0.2, 0.3, 0.6))]
    assert lines["by gradient RMS, temperature 1 (default)"][0] == f"{sum(brings) / 2:.4f}"


def test_rows_of_options_that_are_gone_still_have_a_case() -> None:
    old = {**row("grass", 1e-4, 0, 1.0, grass={**SETTINGS, "an_option_of_old": 1}), "offload": None}
    assert Case(old, [0]).grass.sample_period == SETTINGS["sample_period"]


def test_draws_are_measured_by_what_importance_moves_and_by_what_they_share() -> None:
    skewed = row(
        "grass", 1e-3, 0, 1.0, scores=[{"probabilities": [0.7, 0.1, 0.1, 0.1]}, {"probabilities": [0.25] * 4}]
    )
    assert draws.distance(skewed) == pytest.approx(0.45 / 2)
    assert draws.distance(row("uniform", 1e-3, 0, 1.0, scores=[])) is None
    ours, theirs = (
        row("grass", 1e-3, 0, 1.0, active=active) for active in ([None, [0, 1], [2, 3]], [[0, 1], [0, 2], [2, 3]])
    )
    assert draws.alike(ours, theirs) == 0.75  # of the two steps in which both train
    assert draws.alike(ours, row("full", 1e-3, 0, 1.0)) is None
    assert draws.alike({**ours, "active": ours["active"][:2]}, theirs) is None
