# SPDX-License-Identifier: Apache-2.0
"""Suite ``cpu``: time, memory and traffic of a step of SmolLM2 on two ranks."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from benchmarks.case import Case, Request

# One draw in five steps: several within what is measured.
SMALL: dict[str, Any] = {"kind": "cost", "ranks": 2, "grass": {"sample_period": 5}}
TIMED: dict[str, Any] = {**SMALL, "plain": True}
# The default period: ZeRO-3 traces the first step with a new lowest layer, which a shorter period would exaggerate.
ZERO3: dict[str, Any] = {"stage": 3, "grass": {"sample_period": 25}}
SAMPLED = ("grass", "uniform", "cyclic")
# What a user would pick instead: method, ZeRO stage.
STOCK = (("full", 2), ("full", 3), ("lora", 2), ("lora-fa", 2), ("lisa-toggle", 2))


def cases(request: Request) -> Iterator[Case]:
    """What users choose between in interleaved rounds, and variants beside the first round.

    Rounds are outermost, so that a slow minute of the machine hits all methods.
    """
    for seed in range(request.rounds):
        yield from _defaults(seed)
        if seed == 0:
            yield from _variants()


def _defaults(seed: int) -> Iterator[Case]:
    """All methods in their defaults. Sampled ones take more steps, as a step costs what its layers cost."""
    for method, stage in STOCK:
        yield Case(**TIMED, method=method, stage=stage, seed=seed, steps=8)
    for method in SAMPLED:
        yield Case(**TIMED, method=method, seed=seed, steps=20)
    yield Case(**TIMED | ZERO3, method="badam-package", seed=seed, steps=27)
    yield Case(**TIMED | ZERO3, method="grass", seed=seed, steps=50)


def _variants() -> Iterator[Case]:
    """Other stages, offload, modules that always train, accumulation and checkpointing."""
    for method in ("full-offload", "lora-16"):
        yield Case(**TIMED, method=method, steps=8)
    for method in SAMPLED:
        yield Case(**TIMED, method=method, stage=1, steps=10)
    for method in ("uniform", "cyclic"):
        yield Case(**TIMED | ZERO3, method=method, steps=50)
    for method, stage, offload in product(SAMPLED, ({"stage": 1}, {"stage": 2}, ZERO3), ("none", "nvme-stream")):
        yield Case(**SMALL | stage, method=method, offload=offload, steps=6)
    # SmolLM2's head is its embeddings: {norm, head} trains the same as {embed, norm, head}.
    for method, steps in (("full-sampler", 5), ("lisa", 10), ("grass-embed", 10)):
        yield Case(**TIMED, method=method, steps=steps)
    for offload in (None, "none"):
        yield Case(**SMALL, method="grass", offload=offload, prepare_state=True, steps=10)
    for method in ("full", "lora", "grass"):
        yield Case(**TIMED, method=method, accumulation=4, steps=4)
    for method, steps in (("full", 5), ("lora", 5), ("grass", 10)):
        yield Case(**TIMED, method=method, checkpointing=True, steps=steps)
