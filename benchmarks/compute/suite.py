# SPDX-License-Identifier: Apache-2.0
"""Suite ``compute``: a step that arithmetic rules, with many tokens, on one rank.

Suite ``cpu`` has steps of few tokens, in which the optimizer takes much of the time.
"""

from collections.abc import Iterator
from itertools import product

from benchmarks.case import Case, Request

TOKENS = {"micro_batch": 4, "sequence": 512}
# Layers at a time, and keys of expansion.
EXPANSIONS: tuple[dict[str, float], ...] = ({}, {"expansion": 0.2}, {"expansion": 0.2, "expansion_depth": 0})
SAMPLED = tuple({"num_active_layers": gamma, **keys} for gamma, keys in product((2, 8), EXPANSIONS))
# The lowest layer of a draw decides what it costs: several draws, as many steps each.
STEPS, PERIOD = 6, 2


def cases(request: Request) -> Iterator[Case]:
    """All methods without and with gradient checkpointing, in rounds."""
    common = {"kind": "cost", "warmup": 1, **TOKENS}
    for seed, checkpointing in product(range(request.rounds), (False, True)):
        for method in ("full", "lora"):
            yield Case(**common, method=method, checkpointing=checkpointing, seed=seed, steps=3)
        for keys in SAMPLED:
            yield Case(
                **common,
                method="grass",
                grass={"probe_steps": 1, "sample_period": PERIOD, **keys},
                checkpointing=checkpointing,
                seed=seed,
                steps=STEPS,
            )
