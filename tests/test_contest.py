# SPDX-License-Identifier: Apache-2.0
"""The quality suite: which learning rates are tried, which cells follow from them, and what its tables make of rows."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama

from benchmarks import contest, curves, excerpts, floors, spending, staleness, standings, worth
from benchmarks.contest import GRID, METHODS, RATES, SETTINGS, STEPS, TUNING_SEED

TASK = "arithmetic"


def row(method: str, lr: float, seed: int, dev_loss: float, **changed: Any) -> dict[str, Any]:
    """A row as a cell writes it, as far as this suite reads it."""
    return {
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
    cells = list(contest.contest_cells(["compare", "ablate", "reprobe"], [TASK], rows))
    assert {cell["method"] for cell in cells if cell["steps"]} == {"grass"}
    assert {cell["lr"] for cell in cells if cell["steps"]} == {GRID[1]}
    assert [cell["seed"] for cell in cells if "curve" in cell] == [*contest.SEEDS]
    assert TUNING_SEED not in contest.SEEDS
    assert len([cell for cell in cells if cell["grass"] not in ({}, SETTINGS)]) == len(contest.ABLATION_SEEDS) * len(
        contest.CHANGES
    )
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


@pytest.mark.usefixtures("known_flops")
def test_sections_show_what_there_is(tmp_path: Path) -> None:
    assert standings.sections([]) == []
    tuning = tuned("grass", dict(zip(GRID, (2.0, 1.0, 3.0), strict=True)))
    text = "\n".join(standings.sections(tuning))
    assert "| grass |  | 2.000 | **1.000** | 3.000 |  |" in text
    assert "What was reached" not in text
    curve = {"curve": [{"step": 10, "cpu_seconds": 3.0, "dev_loss": 1.0}], "active": [None, *([[0, 3]] * (STEPS - 1))]}
    changed = row("grass", 1e-4, 0, 0.75, grass={**SETTINGS, "temperature": 4.0}, cpu_seconds=150.0)
    dropped = row("grass", 1e-4, 0, 1.5, grass={**SETTINGS, "an_option_of_old": 1}, cpu_seconds=50.0)
    text = "\n".join(standings.sections([*tuning, reached("grass", 0, 1.0, 0.5, **curve), changed, dropped]))
    assert "| `an_option_of_old` 1 | +0.500 (+0.500) | 1.96 | 0.50 | 1 |" in text
    assert "| 1.000 | 1.000 | 0.500 | 0.500 | 0.500 | 2.00 | 2.00 GB | 7.0 M | 1 |" in text
    assert "| `temperature` 4.0 | -0.250 (-0.250) | 1.96 | 1.50 | 1 |" in text
    images = {path.name for path in curves.draw([reached("grass", 0, 1.0, 0.5, **curve)], tmp_path)}
    assert images == {f"loss-{TASK}.png", f"layers-{TASK}.png"}
    assert all(f"(plots/{name})" in text for name in images)


@pytest.mark.usefixtures("known_flops")
def test_longer_runs_are_beside_the_short_one() -> None:
    points = [{"step": step, "cpu_seconds": 1.0, "dev_loss": loss} for step, loss in ((50, 0.8), (200, 0.7))]
    long = row("grass", 1e-4, 0, 0.7, steps=200, batches=[[2, 8]] * 200, curve=points, cpu_seconds=400.0)
    rows = [long, reached("grass", 0, 1.0, 0.5), reached("grass", 1, 9.0, 0.5)]
    text = "\n".join(standings.sections(rows))
    assert "| **grass**, 2 layers + final norm (default) | 0.0001 | 0.800 | 0.700 | 1.000 | 6400 | 400 | 0 |" in text
    assert "for the same spending" not in text  # the long run is not part of it
    assert "2 seeds" in text
    cells = list(contest.contest_cells(["long"], [TASK], tuned("full", dict(zip(GRID, (2.0, 1.0, 3.0), strict=True)))))
    assert [(cell["method"], cell["lr"], cell["steps"]) for cell in cells] == [("full", GRID[1], contest.LONG)]


def test_readme_quotes_what_was_reached() -> None:
    rows = [
        reached("uniform", 0, 1.5, 0.25),
        reached("uniform", 1, 2.0, 0.75),
        reached("grass", 0, 1.0, 0.5),
        reached("grass", 1, 3.0, 0.5),
        *tuned("grass", {GRID[0]: 9.0}),
    ]
    text = " ".join(excerpts.quality_sentences(rows).split())
    assert "2 seeds" in text
    assert "held-out loss `uniform` 1.750 ± 0.354, `grass` 2.000 ± 1.414;" in text
    assert text.endswith("within a seed `grass` - `uniform` +0.250 ± 1.061 (-0.500, +1.000).")
    assert excerpts.quality_sentences(tuned("grass", {GRID[0]: 9.0})) == ""


def test_staleness_compares_with_scores_measured_anew() -> None:
    assert staleness.rank_correlation([1.0, 2.0, 3.0], [2.0, 4.0, 9.0]) == pytest.approx(1.0)
    assert staleness.rank_correlation([1.0, 2.0, 3.0], [9.0, 4.0, 2.0]) == pytest.approx(-1.0)
    points = [
        {"step": 4, "scores": [1.0, 2.0, 3.0], "true": [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]},
        {"step": 8, "scores": [3.0, 2.0, 1.0], "true": [[2.0, 2.0, 2.5], [1.0, 2.0, 2.5]]},
    ]
    first, second = staleness.staleness_table([{"reprobes": points}])[2:]
    assert first.split(" | ")[1:5] == ["1.00", "1.00", "1.00", "1.00"]
    assert second.split(" | ")[1:3] == ["-1.00", "1.00"]  # what was probed still holds, what is drawn by does not


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
    assert found["scores"] == pytest.approx(staleness.gradient_rms(copy.deepcopy(model).float(), batches))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_worth_says_what_each_draw_brings() -> None:
    found = {"steps": 5, "scores": [3.0, 1.0, 2.0], "before": 2.0, "losses": [1.0, 1.7, 1.4]}
    rows = [row("grass", 1e-3, seed, 2.0, worth=found) for seed in (0, 1)]
    note = worth.worth_note(rows)
    assert "with their worth: +1.00; of two seeds' gradient RMS +1.00, of two seeds' worths +1.00." in note
    lines = {name: values for name, *values in (line.strip("| ").split(" | ") for line in worth.worth_table(rows)[2:])}
    assert lines["uniformly"] == ["0.6333", "1.00", "1.00", "1.00"]
    # three layers: 7, 6 and 5 forward passes of a layer
    assert lines["the layer that is worth most"] == ["1.0000", "1.58", "1.17", "1.35"]
    weights = [math.exp(score / 2.0) for score in found["scores"]]
    mean = sum(weight * value for weight, value in zip(weights, (1.0, 0.3, 0.6), strict=True)) / sum(weights)
    assert lines["by gradient RMS, temperature 1 (default)"][0] == f"{mean:.4f}"
