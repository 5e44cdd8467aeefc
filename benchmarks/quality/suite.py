# SPDX-License-Identifier: Apache-2.0
"""Suite ``quality``: its parts. The part ``tune`` finds the learning rate of every method for the others."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.case import Case
from benchmarks.suite import Request
from benchmarks.tasks import TASKS

Row = dict[str, Any]
STEPS = 50
FEWER = 41  # as much arithmetic as STEPS with `cost_weight` 8, an option that was tried and removed
LONG = 200  # whether what holds after STEPS holds because they are few
RATES = (1.25e-5, 5e-5, 2e-4, 8e-4, 3.2e-3)
GRID = RATES[1:4]  # of every method; then the next one as long as the best is at the edge of those tried
TUNING_SEED = 9  # of no run that is reported
SEEDS = (0, 1, 2)
ABLATION_SEEDS = SEEDS[:2]  # so that a part fits in 40 minutes
# SmolLM2's head is its embeddings: "grass-embed" is grass with a head that trains.
COMPARED = ("full", "lora", "uniform", "cyclic", "static", "grass", "grass-sharp", "grass-embed")
LONG_METHODS = ("full", "lora", "uniform", "grass")  # with the first seed
# Short runs: the sampler's periods are a fifth of its defaults, alike for all methods.
SETTINGS = {"probe_steps": 4, "sample_period": 5, "refresh_period": 10}
# One change of "grass" at a time.
CHANGES: tuple[dict[str, Any], ...] = (
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
# Other seeds of the sampler, added to the seed of the rows: how much a loss changes by chance alone.
OTHER_DRAWS = (100, 200)
DRAWN = ("uniform", "grass")  # compared with other draws, and in long runs
# Of runs whose scores are compared with scores measured anew; 0: probed once. The others end with steps that train.
REPROBE_PERIODS = (0, 21, 10)


def cases(request: Request) -> Iterator[Case]:
    """Cases that can run with the rows that are there; without its learning rate, a method has only ``tune``."""
    for task, part in product(request.tasks, request.parts):
        yield from MAKERS[part](task, request.rows)


# ---- learning rates ------------------------------------------------------------------------------------------------


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
    """What is still to try, given the losses of what was tried: the grid, then beyond the edge that is best."""
    if missing := [lr for lr in GRID if lr not in losses]:
        return missing
    at = RATES.index(min(losses, key=losses.__getitem__))
    return [RATES[i] for i in (at - 1, at + 1) if 0 <= i < len(RATES) and RATES[i] not in losses]


# ---- parts ---------------------------------------------------------------------------------------------------------


def quality_case(task: str, method: str, **changed: Any) -> Case:
    """A run of ``STEPS`` steps."""
    shape = {"micro_batch": TASKS[task].micro_batch, "sequence": TASKS[task].sequence}
    return Case(
        **{"kind": "quality", "task": task, "method": method, **shape, "steps": STEPS, "grass": SETTINGS, **changed}
    )


def _tune(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    tried = tried_rates(task, rows)
    for lr, method in product(RATES, COMPARED):
        if lr in GRID or lr in untried_rates(tried.get(method, {})):
            yield quality_case(task, method, lr=lr, seed=TUNING_SEED, tuning=True)


def _compare(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    yield quality_case(task, "full", lr=GRID[0], steps=0, grass={})  # untrained
    rates = best_rates(task, rows)
    for seed, method in product(SEEDS, COMPARED):
        if method in rates:
            yield quality_case(task, method, lr=rates[method], seed=seed, curve=10)


def _ablate(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    for known in _of_grass(task, rows):
        for change in CHANGES:
            yield quality_case(task, "grass", **known, grass={**SETTINGS, **change})
        yield quality_case(task, "grass", **known, steps=FEWER)


def _redraw(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    rates = best_rates(task, rows)
    for seed, more, method in product(ABLATION_SEEDS, OTHER_DRAWS, DRAWN):
        if method in rates:
            settings = {**SETTINGS, "seed": more + seed}
            yield quality_case(task, method, lr=rates[method], seed=seed, grass=settings, tuning=True)


def _reprobe(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    for known, period in product(_of_grass(task, rows), REPROBE_PERIODS):
        settings = {**SETTINGS, "reprobe_period": period} if period else SETTINGS
        yield quality_case(task, "grass", **known, grass=settings, reprobe=10)


def _ablate_layers(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    """As many steps as between two draws, and no run after them."""
    for known in _of_grass(task, rows):
        yield quality_case(task, "grass", **known, ablate_layers=SETTINGS["sample_period"], steps=0, grass={})


def _long(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    """With the learning rates of short runs; all seeds of the methods that are compared in pairs."""
    rates = best_rates(task, rows)
    for seed in SEEDS:
        for method in LONG_METHODS if seed == SEEDS[0] else DRAWN:
            if method in rates:
                yield quality_case(task, method, lr=rates[method], seed=seed, steps=LONG, curve=50, tuning=True)


def _of_grass(task: str, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Fields of cases of ``grass`` alone: its best learning rate, each seed; none before the rate is known."""
    lr = best_rates(task, rows).get("grass")
    return [] if lr is None else [{"lr": lr, "seed": seed, "tuning": True} for seed in ABLATION_SEEDS]


MAKERS: dict[str, Callable[[str, Sequence[Row]], Iterator[Case]]] = {
    "tune": _tune,
    "compare": _compare,
    "ablate": _ablate,
    "redraw": _redraw,
    "reprobe": _reprobe,
    "ablate-layers": _ablate_layers,
    "long": _long,
}
PARTS = tuple(MAKERS)
