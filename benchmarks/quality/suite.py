# SPDX-License-Identifier: Apache-2.0
"""Suite ``quality``: its parts. The part ``tune`` finds the learning rate of every method for the others."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Any

from benchmarks.case import Case, Request, Row
from benchmarks.tasks import TASKS

STEPS = 50
RATES = (1.25e-5, 5e-5, 2e-4, 8e-4, 3.2e-3)
GRID = RATES[1:4]  # of every method; then the next one as long as the best is at the edge of those tried
TUNING_SEED = 9  # of no run that is reported
SEEDS = (0, 1, 2)
# SmolLM2's head is its embeddings: "grass-embed" is grass with a head that trains.
COMPARED = ("full", "lora", "uniform", "cyclic", "static", "grass", "grass-sharp", "grass-embed")
COMPARED_TASKS = ("arithmetic", "choice")
# Short runs: the sampler's periods are a fifth of its defaults, alike for all methods.
SETTINGS = {"probe_steps": 4, "sample_period": 5, "refresh_period": 10}


def cases(request: Request) -> Iterator[Case]:
    """Cases that can run with the rows that are there; without its learning rate, a method has only ``tune``."""
    for task, part in product(request.tasks, request.parts):
        yield from MAKERS[part](task, request.rows)


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


def quality_case(task: str, method: str, **changed: Any) -> Case:
    """A run of ``STEPS`` steps."""
    shape = {"micro_batch": TASKS[task].micro_batch, "sequence": TASKS[task].sequence}
    return Case(
        **{"kind": "quality", "task": task, "method": method, **shape, "steps": STEPS, "grass": SETTINGS, **changed}
    )


def _tune(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    tried = tried_rates(task, rows)
    for lr, method in product(RATES, COMPARED):
        losses = tried.get(method, {})
        if lr in (*GRID, *losses, *untried_rates(losses)):
            yield quality_case(task, method, lr=lr, seed=TUNING_SEED, tuning=True)


def _compare(task: str, rows: Sequence[Row]) -> Iterator[Case]:
    yield quality_case(task, "full", lr=GRID[0], steps=0, grass={})  # untrained
    rates = best_rates(task, rows)
    for seed, method in product(SEEDS, COMPARED):
        if method in rates:
            yield quality_case(task, method, lr=rates[method], seed=seed, curve=10)


# A part: task, rows that are there -> its cases.
MAKERS: dict[str, Callable[[str, Sequence[Row]], Iterator[Case]]] = {"tune": _tune, "compare": _compare}
PARTS = tuple(MAKERS)
