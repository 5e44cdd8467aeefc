# SPDX-License-Identifier: Apache-2.0
"""Suite ``levers``: what else may lower the loss, each change against its base at equal steps, rows and seeds."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

from benchmarks.case import Case, Request, Row
from benchmarks.quality.suite import SEEDS, SETTINGS, STEPS, TUNING_SEED, quality_case
from benchmarks.samplers.suite import GAMMA, RATE
from grass_ds.sampling.importance import sampling_logits, softmax

TASK = "arithmetic"
BATCHES = 16  # that measure gradients
LONG = 200  # steps of the runs that compare periods
PERIODS = (5, 25, 100)
RAMP = 5  # steps in which the learning rate rises after a draw
LONG_SEEDS = SEEDS[:2]


class Lever(NamedTuple):
    """A change: the method, keys of its "grass" block, and steps in which the rate rises again after every draw."""

    name: str
    method: str = "uniform"
    keys: Mapping[str, Any] = MappingProxyType({})
    ramp: int = 0
    steps: int = STEPS

    def case(self, seed: int) -> Case:
        grass = {**SETTINGS, "num_active_layers": GAMMA, **self.keys}
        return quality_case(
            TASK, self.method, lr=RATE, seed=seed, steps=self.steps, ramp=self.ramp, answers=False, grass=grass
        )


MEASURED = quality_case(TASK, "full", kind="scores", steps=BATCHES, seed=TUNING_SEED, grass={})
BASE, LONG_BASE = Lever("uniform"), Lever("period 5, keep", steps=LONG)


def weighted(name: str, weights: Sequence[float]) -> Lever:
    return Lever(name, "weighted", {"sampler_args": {"weights": list(weights)}})


def draws(rows: Sequence[Row]) -> list[Lever]:
    """The draws; those by gradients once these are measured."""
    layers = 30
    middle = [1 - abs(2 * (layer + 0.5) / layers - 1) for layer in range(layers)]
    found = [BASE, Lever("stratified", "stratified"), Lever("window", "window"), weighted("middle", middle)]
    for row in rows:
        if row["kind"] == "scores":
            for signal in ("rms", "l1"):
                found.append(weighted(f"by {signal}", softmax(sampling_logits(row[signal], 1.0, "mean"))))
    return found


def periods() -> list[Lever]:
    """Periods and what happens to Adam state between them; a rise of the rate where there are few draws."""
    found = []
    for period, state, ramp in product(PERIODS, ("keep", "reset"), (0, RAMP)):
        if ramp < period and (ramp == 0 or period > min(PERIODS)):
            name = f"period {period}, {state}{f', rate rises over {ramp}' if ramp else ''}"
            found.append(Lever(name, keys={"sample_period": period, "state_on_switch": state}, ramp=ramp, steps=LONG))
    return found


def cases(request: Request) -> Iterator[Case]:
    yield MEASURED
    for seed, lever in product(SEEDS, draws(request.rows)):
        yield lever.case(seed)
    for seed, lever in product(LONG_SEEDS, periods()):
        yield lever.case(seed)
