# SPDX-License-Identifier: Apache-2.0
"""Suite ``samplers``: what the draw changes, with all else equal."""

from collections.abc import Iterator
from itertools import product

from benchmarks.case import Case, Request
from benchmarks.frontier.suite import RULE
from benchmarks.quality.suite import SEEDS, SETTINGS, quality_case

GAMMA = 8
RATE = RULE / GAMMA
BASE = "uniform"
# Names of methods.METHODS, one per line.
SAMPLERS = (
    BASE,
    "stratified",
    "grass",
    "grass-stratified",
    "static",
    "outlier",
    "cyclic",
    "module",
    "ist",
)
RATES = {"ist": 4e-4}  # of adapters: the best of LoRA r=128 in suite ``frontier``


def cases(request: Request) -> Iterator[Case]:
    """All samplers with one seed after the other, so that a suite that is cut short has whole comparisons."""
    for seed, task, sampler in product(SEEDS, request.tasks, SAMPLERS):
        rate = RATES.get(sampler, RATE)
        yield quality_case(task, sampler, lr=rate, seed=seed, grass={**SETTINGS, "num_active_layers": GAMMA})
