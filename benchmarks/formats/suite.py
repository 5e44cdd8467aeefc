# SPDX-License-Identifier: Apache-2.0
"""Suite ``formats``: what ``offload.state_format`` costs in loss, and saves in bytes and time."""

from collections.abc import Iterator
from itertools import product

from benchmarks.case import Case, Request
from benchmarks.frontier.suite import RULE, TASK
from benchmarks.quality.suite import SEEDS, SETTINGS, quality_case

DTYPE = "bf16"  # fp32 weights are their own master weights
METHOD = "uniform"  # draws by nothing but the seed, so that all formats step the same layers
STEPS = 200
GAMMAS = (2, 8)
BASE = "fp32"
FORMATS = (BASE, "exact", "bf16", "8bit")
TIERS = ("none", "cpu-stream", "nvme-stream")  # of offload.suite.OFFLOADS


def cases(request: Request) -> Iterator[Case]:
    """Losses of one seed after the other, then bytes and time of every format on every tier.

    ``exact`` has the bits of fp32, so one seed is enough to see it.
    """
    for seed, gamma, name in product(SEEDS, GAMMAS, FORMATS):
        if name != "exact" or seed == SEEDS[0]:
            grass = {**SETTINGS, "num_active_layers": gamma, "offload": {"state_format": name}}
            yield quality_case(TASK, METHOD, lr=RULE / gamma, seed=seed, steps=STEPS, answers=False, grass=grass)
    for seed, tier, name in product(range(request.rounds), TIERS, FORMATS):
        yield Case(
            **{"kind": "cost", "method": METHOD, "offload": tier, "seed": seed, "steps": 10, "prepare_state": True},
            grass={"num_active_layers": GAMMAS[-1], "sample_period": 5, "offload": {"state_format": name}},
        )
