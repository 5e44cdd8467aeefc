# SPDX-License-Identifier: Apache-2.0
"""Suite ``frontier``: what loss for how much time and memory, each setting at a learning rate of its own."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from benchmarks.case import Case, Request, Row
from benchmarks.quality.suite import SEEDS, SETTINGS, TUNING_SEED, quality_case

TASK = "arithmetic"
GAMMAS = (1, 2, 4, 8, 15, 30)
RULE = 1.6e-3  # learning rate x layers at a time, of the pilot
FACTORS = (0.5, 1.0, 2.0)
# Grids of equal size around what the quality suite found; LoRA r=16 starts at the rates of r=128.
BASELINES = {"full": 5e-5, "lora-16": 4e-4, "lora": 2e-4}
EXPANSIONS = (0.1, 0.2, 0.4)
EXPANDED = (1, 2, 4, 8)  # gammas that are tried with it


class Setting(NamedTuple):
    """A point of the frontier. ``gamma``: layers at a time, None for methods that are not ours."""

    method: str
    gamma: int | None = None
    expansion: float = 0.0

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try first, ascending."""
        middle = BASELINES[self.method] if self.gamma is None else RULE / self.gamma
        return tuple(middle * factor for factor in FACTORS)

    def case(self, lr: float, **changed: object) -> Case:
        grass: dict[str, float] = {} if self.gamma is None else {**SETTINGS, "num_active_layers": self.gamma}
        if self.expansion:
            grass["expansion"] = self.expansion
        return quality_case(TASK, self.method, lr=lr, grass=grass, **changed)


ADAM = (
    *(Setting(method) for method in BASELINES),
    *(Setting("uniform", gamma) for gamma in GAMMAS),
    *(Setting("grass", gamma) for gamma in (2, 8)),
)
WITH_EXPANSION = tuple(Setting("uniform", *both) for both in product(EXPANDED, EXPANSIONS))


def setting(row: Row) -> Setting:
    return Setting(row["method"], row["grass"].get("num_active_layers"), row["grass"].get("expansion", 0.0))


def tried_rates(one: Setting, rows: Iterable[Row]) -> dict[float, float]:
    """Learning rates tried, with their development loss."""
    mine = (row for row in rows if setting(row) == one and row["seed"] == TUNING_SEED)
    return {row["lr"]: row["dev_loss"] for row in mine}


def best_rate(one: Setting, rows: Iterable[Row]) -> float | None:
    """The rate with the least development loss; None while rates are still to be tried."""
    losses = tried_rates(one, rows)
    return None if untried_rates(one, losses) else min(losses, key=losses.__getitem__)


def untried_rates(one: Setting, losses: dict[float, float]) -> list[float]:
    return beyond(one.rates, losses)


def beyond(grid: Sequence[float], losses: dict[float, float]) -> list[float]:
    """What is still to try: the grid, then twice or half the best as long as that is at an edge of what was tried."""
    if missing := [value for value in grid if value not in losses]:
        return missing
    best = min(losses, key=losses.__getitem__)
    return [best * 2] if best == max(losses) else [best / 2] if best == min(losses) else []


def expansions(gamma: int, rows: Iterable[Row]) -> dict[float, float]:
    """Coefficients tried at ``gamma``, with their least development loss."""
    found: dict[float, float] = {}
    for row in rows:
        one = setting(row)
        if one.method == "uniform" and one.gamma == gamma and one.expansion and row["seed"] == TUNING_SEED:
            found[one.expansion] = min(row["dev_loss"], found.get(one.expansion, row["dev_loss"]))
    return found


def with_expansion(rows: Iterable[Row]) -> dict[Setting, bool]:
    """The settings with expansion that are tried; whether it is the best one of its gamma."""
    chosen: dict[Setting, bool] = {}
    for gamma in EXPANDED:
        losses = expansions(gamma, rows)
        untried = beyond(EXPANSIONS, losses)
        best = None if untried else min(losses, key=losses.__getitem__)
        chosen |= {Setting("uniform", gamma, value): value == best for value in sorted({*losses, *untried})}
    return chosen


def cases(request: Request) -> Iterator[Case]:
    """Tuning first, with the rates that its own rows ask for; expansion at the best rate of the same gamma without."""
    rows = request.rows
    for one in ADAM:
        losses = tried_rates(one, rows)
        for lr in (*losses, *untried_rates(one, losses)):
            yield one.case(lr, seed=TUNING_SEED, tuning=True)
    best = {one: best_rate(one, rows) for one in ADAM}
    expanded = with_expansion(rows)
    for one in expanded:
        if (rate := best[one._replace(expansion=0.0)]) is not None:
            yield one.case(rate, seed=TUNING_SEED, tuning=True)
    reported = (*ADAM, *(one for one, chosen in expanded.items() if chosen))
    for seed, one in product(SEEDS, reported):
        if (rate := best[one._replace(expansion=0.0)]) is not None:
            yield one.case(rate, seed=seed, answers=False)
