# SPDX-License-Identifier: Apache-2.0
"""Suite ``offload``: every "offload" block in interleaved rounds."""

from collections.abc import Iterator

from benchmarks.case import Case
from benchmarks.offload.variants import OFFLOADS
from benchmarks.suite import Request


def cases(request: Request) -> Iterator[Case]:
    """One seed per round, so that all variants step the same layers: ``uniform`` draws by nothing but the seed.

    One draw in five steps is five times as many as by default: draws are what ``period`` pays for.
    """
    for seed in range(request.rounds):
        for offload in OFFLOADS:
            yield Case(
                kind="cost",
                method="uniform",
                ranks=2,
                offload=offload,
                seed=seed,
                warmup=5,
                steps=25,
                prepare_state=True,
                grass={"sample_period": 5},
            )
