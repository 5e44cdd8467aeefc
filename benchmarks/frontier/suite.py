# SPDX-License-Identifier: Apache-2.0
"""Suite ``frontier``: what loss for how much time and memory, each setting at a learning rate of its own."""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from benchmarks.case import Case, Request, Row
from benchmarks.quality.suite import SEEDS, SETTINGS, TUNING_SEED, quality_case

TASK = "arithmetic"
RULE = 1.6e-3  # learning rate x layers at a time, of the pilot
FACTORS = (0.5, 1.0, 2.0)
EXPANSIONS = (0.1, 0.2, 0.4)
# Layers at a time that are tried with it; whether deeper layers and other rates gain is asked of the first two.
EXPANDED = (2, 8, 1, 4)
EXPANDED_FULLY = EXPANDED[:2]


class Setting(NamedTuple):
    """A point of the frontier.

    Attributes:
        gamma: layers at a time, None for methods that are not ours.
        expansion, depth: keys ``expansion`` and ``expansion_depth``.
    """

    method: str
    gamma: int | None = None
    expansion: float = 0.0
    depth: int | None = None

    def case(self, lr: float, **changed: object) -> Case:
        grass: dict[str, float] = {} if self.gamma is None else {**SETTINGS, "num_active_layers": self.gamma}
        if self.expansion:
            grass["expansion"] = self.expansion
        if self.depth is not None:
            grass["expansion_depth"] = self.depth
        return quality_case(TASK, self.method, lr=lr, grass=grass, **changed)


# Learning rates that a search in fp32 found (STUDIES.md, "Learning rates"). Steps this large survive bf16 weights.
SETTLED = {
    Setting("lora-16"): 1.6e-3,
    Setting("lora"): 4e-4,
    Setting("uniform", 1): 8e-4,
    Setting("uniform", 2): 8e-4,
    Setting("uniform", 4): 4e-4,
    Setting("grass", 2): 4e-4,
}
# Middles of the grids of the others, whose best rate may be another in bf16, or was at an edge.
SEARCHED = {
    Setting("full"): 5e-5,
    Setting("uniform", 8): 2e-4,
    Setting("uniform", 15): 1e-4,
    Setting("uniform", 30): 1e-4,
    Setting("grass", 8): 2e-4,
    Setting("lisa", 2): 4e-4,
    Setting("sign-sgd", 30): 1e-4,
}


def around(middle: float) -> tuple[float, ...]:
    return tuple(middle * factor for factor in FACTORS)


def setting(row: Row) -> Setting:
    grass = row["grass"]
    depth = grass.get("expansion_depth")
    return Setting(row["method"], grass.get("num_active_layers"), grass.get("expansion", 0.0), depth)


class Plan:
    """What the rows ask for: a search per setting that lacks one, with expansion for the coefficient and then the rate.

    Attributes:
        tuning: settings and learning rates to be measured with the tuning seed, those that are done included.
        settled: setting -> its best learning rate; if searched for here, once it has worse neighbours.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._losses = {(setting(row), row["lr"]): row["dev_loss"] for row in rows if row["seed"] == TUNING_SEED}
        self.tuning: list[tuple[Setting, float]] = []
        self.settled = dict(SETTLED)
        for one, middle in SEARCHED.items():
            self._search_rate(one, around(middle))
        for gamma in EXPANDED:
            self._expand(gamma)

    def tried(self, one: Setting) -> dict[float, float]:
        """Learning rates with their development loss."""
        return {lr: loss for (other, lr), loss in self._losses.items() if other == one}

    def _search_rate(self, one: Setting, grid: Sequence[float]) -> None:
        losses = self.tried(one)
        untried = beyond(grid, losses)
        self.tuning += [(one, lr) for lr in (*losses, *untried) if (one, lr) not in self.tuning]
        if not untried:
            self.settled[one] = min(losses, key=losses.__getitem__)

    def _expand(self, gamma: int) -> None:
        """The coefficient at the rate without expansion, then whether deeper layers gain, then the rate."""
        if (rate := self.settled.get(Setting("uniform", gamma))) is None:
            return
        losses = {
            one.expansion: loss
            for (one, lr), loss in self._losses.items()
            if one.expansion and (one.method, one.gamma, one.depth, lr) == ("uniform", gamma, None, rate)
        }
        untried = [value for value in beyond(EXPANSIONS, losses) if value <= 1]  # the key's largest value
        self.tuning += [(Setting("uniform", gamma, value), rate) for value in sorted([*losses, *untried])]
        if untried:
            return
        chosen = Setting("uniform", gamma, min(losses, key=losses.__getitem__))
        if gamma not in EXPANDED_FULLY:
            self.settled[chosen] = rate
            return
        deep = chosen._replace(depth=0)
        self.tuning.append((deep, rate))
        if (deep, rate) in self._losses:
            best = min((chosen, deep), key=lambda one: self._losses[one, rate])
            if best == deep:
                self.settled[chosen] = rate  # costs less
            self._search_rate(best, around(rate))


def beyond(grid: Sequence[float], losses: dict[float, float]) -> list[float]:
    """What is still to try: the grid, then twice or half the best as long as that is at an edge of what was tried."""
    if missing := [value for value in grid if value not in losses]:
        return missing
    best = min(losses, key=losses.__getitem__)
    return [best * 2] if best == max(losses) else [best / 2] if best == min(losses) else []


def cases(request: Request) -> Iterator[Case]:
    """Tuning first, with what its own rows ask for; then all seeds of the settings that are settled."""
    plan = Plan(request.rows)
    for one, lr in plan.tuning:
        yield one.case(lr, seed=TUNING_SEED, tuning=True)
    for seed, (one, lr) in product(SEEDS, plan.settled.items()):
        yield one.case(lr, seed=seed, answers=False)
