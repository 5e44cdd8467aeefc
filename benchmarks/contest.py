# SPDX-License-Identifier: Apache-2.0
"""The quality suite: its parts, and the learning rate of every method, which the first part finds for the second."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

from benchmarks.tasks import TASKS

Cell = dict[str, Any]
Row = dict[str, Any]
STEPS = 50
FEWER = 41  # steps that cost as much arithmetic as STEPS with `cost_weight` 8, an option that was tried (see the rows)
LONG = 200  # steps of the runs that tell whether what is found after STEPS is so because they are few
RATES = (1.25e-5, 5e-5, 2e-4, 8e-4, 3.2e-3)
GRID = RATES[
    1:4
]  # tried with every method; of the others the next one as long as the best is at the edge of those tried
TUNING_SEED = 9  # of no run that is reported
SEEDS = (0, 1, 2)
ABLATION_SEEDS = SEEDS[:2]  # a part of the suite is to fit in 40 minutes
# Tied embeddings, as here, are the head, too: "grass-embed" is grass with an active head.
METHODS = ("full", "lora", "uniform", "cyclic", "static", "grass", "grass-sharp", "grass-embed")
LONG_METHODS = ("full", "lora", "uniform", "grass")  # with the first seed
# Short runs: the sampler's periods are a fifth of its defaults, alike for all methods.
SETTINGS = {"probe_steps": 4, "sample_period": 5, "refresh_period": 10}
# One change at a time of "grass"; of its defaults, but for the periods.
CHANGES: tuple[Cell, ...] = (
    {"temperature": 0.25},
    {"temperature": 4.0},
    {"ema_alpha": 0.2},
    {"ema_alpha": 1.0},
    {"sample_period": 2},
    {"sample_period": 10},
    {"refresh_period": 5},
    {"refresh_period": 20},
    {"num_active_layers": 1},
    {"num_active_layers": 4},
    {"num_active_layers": 8},
    {"probe_steps": 2},
    {"probe_steps": 8},
    {"score_normalization": "none"},
    {"always_active": []},
)
# Nothing but other draws: how much a loss changes by chance alone. Added to the seed, which the sampler has otherwise, too.
OTHER_DRAWS = (100, 200)
DRAWN = ("uniform", "grass")  # compared with them, and in long runs
# Of the runs whose scores are compared with those measured anew; 0: probed once. The others end with steps that train.
REPROBE_PERIODS = (0, 21, 10)


def contest_cells(parts: Iterable[str], tasks: Iterable[str], rows: Iterable[Row]) -> Iterator[Cell]:
    """Cells that can run with the rows that are there: of a method whose learning rate is not yet known, only those that find it."""
    rows = list(rows)
    for task in tasks:
        for part in parts:
            yield from MAKERS[part](task, rows)


def tried_rates(task: str, rows: Iterable[Row]) -> dict[str, dict[float, float]]:
    """Per method the learning rates tried with their development loss, ascending."""
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row["lr"]):
        if row["task"] == task and row["seed"] == TUNING_SEED and row["steps"] == STEPS:
            found[row["method"]][row["lr"]] = row["dev_loss"]
    return found


def best_rates(task: str, rows: Iterable[Row]) -> dict[str, float]:
    """Per method the learning rate with the least development loss; methods with rates still to try are left out."""
    tried = tried_rates(task, rows)
    return {
        method: min(losses, key=losses.__getitem__) for method, losses in tried.items() if not untried_rates(losses)
    }


def untried_rates(losses: dict[float, float]) -> list[float]:
    """What is still to try of :data:`RATES`, given the losses of those tried: the grid, then beyond the edge that is best."""
    if missing := [lr for lr in GRID if lr not in losses]:
        return missing
    at = RATES.index(min(losses, key=losses.__getitem__))
    return [RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES) and RATES[i] not in losses]


def _cell(task: str, method: str, **changed: Any) -> Cell:
    return {
        "kind": "quality",
        "task": task,
        "method": method,
        "ranks": 1,
        "micro-batch": TASKS[task].micro_batch,
        "sequence": TASKS[task].sequence,
        "steps": STEPS,
        "grass": SETTINGS,
        **changed,
    }


def _tune(task: str, rows: list[Row]) -> Iterator[Cell]:
    tried = tried_rates(task, rows)
    for lr in RATES:
        for method in METHODS:
            if lr in GRID or lr in untried_rates(tried.get(method, {})):
                yield _cell(task, method, lr=lr, seed=TUNING_SEED, tuning=True)


def _compare(task: str, rows: list[Row]) -> Iterator[Cell]:
    yield _cell(task, "full", lr=GRID[0], seed=0, steps=0, grass={})
    rates = best_rates(task, rows)
    for seed in SEEDS:
        for method in METHODS:
            if method in rates:
                yield _cell(task, method, lr=rates[method], seed=seed, curve=10)


def _ablate(task: str, rows: list[Row]) -> Iterator[Cell]:
    for lr, seed in _of_grass(task, rows):
        for change in CHANGES:
            yield _cell(task, "grass", lr=lr, seed=seed, grass={**SETTINGS, **change}, tuning=True)
        yield _cell(task, "grass", lr=lr, seed=seed, steps=FEWER, tuning=True)


def _redraw(task: str, rows: list[Row]) -> Iterator[Cell]:
    """Each method with the learning rate that it is best with."""
    rates = best_rates(task, rows)
    for seed, more, method in product(ABLATION_SEEDS, OTHER_DRAWS, DRAWN):
        if method in rates:
            yield _cell(
                task, method, lr=rates[method], seed=seed, grass={**SETTINGS, "seed": more + seed}, tuning=True
            )


def _reprobe(task: str, rows: list[Row]) -> Iterator[Cell]:
    for (lr, seed), period in product(_of_grass(task, rows), REPROBE_PERIODS):
        settings = {**SETTINGS, "reprobe_period": period} if period else SETTINGS
        yield _cell(task, "grass", lr=lr, seed=seed, grass=settings, reprobe=10, tuning=True)


def _worth(task: str, rows: list[Row]) -> Iterator[Cell]:
    """As many steps as between two draws; no run after them."""
    for lr, seed in _of_grass(task, rows):
        worth = SETTINGS["sample_period"]
        yield _cell(task, "grass", lr=lr, seed=seed, worth=worth, steps=0, grass={}, tuning=True)


def _of_grass(task: str, rows: list[Row]) -> Iterator[tuple[float, int]]:
    """The learning rate that ``grass`` is best with, and each seed of what is measured of it alone; nothing before that rate is known."""
    lr = best_rates(task, rows).get("grass")
    if lr is not None:
        for seed in ABLATION_SEEDS:
            yield lr, seed


def _long(task: str, rows: list[Row]) -> Iterator[Cell]:
    """With the learning rates that are best in short runs; all seeds of those that are compared in pairs."""
    rates = best_rates(task, rows)
    for seed in SEEDS:
        for method in LONG_METHODS if seed == SEEDS[0] else DRAWN:
            if method in rates:
                yield _cell(task, method, lr=rates[method], seed=seed, steps=LONG, curve=50, tuning=True)


MAKERS: dict[str, Callable[[str, list[Row]], Iterator[Cell]]] = {
    "tune": _tune,
    "compare": _compare,
    "ablate": _ablate,
    "redraw": _redraw,
    "reprobe": _reprobe,
    "worth": _worth,
    "long": _long,
}
PARTS = tuple(MAKERS)
