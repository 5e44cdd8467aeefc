# SPDX-License-Identifier: Apache-2.0
"""Suite ``checkpoint``: what a checkpoint weighs, and how long training stalls for it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from benchmarks.case import Case, Request

BASE = Case(kind="checkpoint", method="full", ranks=2, steps=10, grass={"probe_steps": 2, "sample_period": 5})
# label -> case. "late": the state of all layers is allocated first: the largest checkpoint that the method writes.
WAYS = {
    "full": BASE,
    "grass, early": replace(BASE, method="grass"),
    "grass, late": replace(BASE, method="grass", prepare_state=True),
    "grass, late, async": replace(BASE, method="grass", prepare_state=True, async_save=True),
}


def cases(request: Request) -> Iterator[Case]:
    """Every way to save, on ZeRO-2 and ZeRO-3."""
    for seed, stage, way in product(range(request.rounds), (2, 3), WAYS.values()):
        yield replace(way, stage=stage, seed=seed)
