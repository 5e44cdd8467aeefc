# SPDX-License-Identifier: Apache-2.0
"""Suite ``compute``: a step that arithmetic rules, with many tokens, on one rank.

Suite ``cpu`` has steps of few tokens, in which the optimizer takes much of the time.
"""

from collections.abc import Iterator
from itertools import product

from benchmarks.case import Case, Request

TOKENS = {"micro_batch": 4, "sequence": 512}
# Layers at a time and the coefficient of expansion.
SAMPLED = ((2, 0.0), (8, 0.0), (2, 0.2), (8, 0.2))
# The lowest layer of a draw decides what it costs: several draws, as many steps each.
STEPS, PERIOD = 6, 2


def cases(request: Request) -> Iterator[Case]:
    """All methods without and with gradient checkpointing, in rounds."""
    common = {"kind": "cost", "warmup": 1, **TOKENS}
    for seed, checkpointing in product(range(request.rounds), (False, True)):
        for method in ("full", "lora"):
            yield Case(**common, method=method, checkpointing=checkpointing, seed=seed, steps=3)
        for gamma, expansion in SAMPLED:
            block = {"probe_steps": 1, "sample_period": PERIOD, "num_active_layers": gamma}
            more = {"expansion": expansion} if expansion else {}
            yield Case(
                **common,
                method="grass",
                grass={**block, **more},
                checkpointing=checkpointing,
                seed=seed,
                steps=STEPS,
            )
