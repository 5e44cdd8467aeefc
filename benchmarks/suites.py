# SPDX-License-Identifier: Apache-2.0
"""The suites: which cells each one runs, in which order. A cell is the arguments of ``cell.py``."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from deepspeed.accelerator import get_accelerator

from benchmarks.growth import growth_cells
from benchmarks.places import OFFLOADS

Cell = dict[str, Any]
# SmolLM2 on two ranks, one draw in five steps: several within what is measured.
SMALL: Cell = {"kind": "cost", "ranks": 2, "micro-batch": 2, "sequence": 128, "grass": {"sample_period": 5}}
SAMPLED = ("grass", "uniform", "cyclic")
# What a user would pick instead: method, ZeRO stage.
STOCK = (
    ("full", 2),
    ("full", 3),
    ("full-offload", 2),
    ("lora-16", 2),
    ("lora", 2),
    ("lora-fa", 2),
    ("lisa-toggle", 2),
    ("badam-package", 3),
)


def cpu_cells(rounds: int) -> Iterator[Cell]:
    """The cost suite: every method in interleaved rounds, its variants in the first, and how cost grows with each number, once.

    Rounds are outermost, so that a slow minute of the machine hits all methods.
    """
    for repetition in range(rounds):
        yield from _core_cells(repetition)
        if repetition == 0:
            yield from _variant_cells()
    yield from growth_cells()


def _core_cells(seed: int) -> Iterator[Cell]:
    """All methods on their default offload, and what plain PyTorch takes for the same: the floor of their time."""
    for method in ("full", "lora"):
        yield {**SMALL, "kind": "plain", "method": method, "seed": seed}
    for method, stage in STOCK:
        yield {**SMALL, "method": method, "stage": stage, "seed": seed, "steps": 10}
    for method, stage in product(SAMPLED, (1, 2, 3)):
        # What a step costs depends on the layers drawn: the stage that most will use has twice as many draws.
        yield {**SMALL, "method": method, "stage": stage, "seed": seed, "steps": 20 if stage == 2 else 10}


def _variant_cells() -> Iterator[Cell]:
    """Offload, always-active sets, accumulation and checkpointing: once each, beside the first round."""
    for method, stage, offload in product(SAMPLED, (1, 2, 3), ("none", "nvme-stream")):
        yield {**SMALL, "method": method, "stage": stage, "offload": offload, "seed": 0, "steps": 6}
    # SmolLM2's head is its embeddings: {norm, head} trains the same as {embed, norm, head}.
    yield {**SMALL, "method": "grass-embed", "stage": 2, "seed": 0, "steps": 10}
    for method in ("full", "lora", "grass"):
        yield {**SMALL, "method": method, "stage": 2, "seed": 0, "accumulation": 4, "steps": 4}
    yield {**SMALL, "kind": "plain", "method": "full", "seed": 0, "checkpointing": True}
    for method in ("full", "lora", "grass"):
        steps = 10 if method == "grass" else 5
        yield {**SMALL, "method": method, "stage": 2, "seed": 0, "checkpointing": True, "steps": steps}


def offload_cells(rounds: int) -> Iterator[Cell]:
    """Every place of the optimizer state. One seed per round, so that all variants step the same layers.

    The sampler is ``uniform``: what is drawn then depends on nothing but the seed. One switch in five steps is five times as many as
    by default: switches are what ``period`` pays for.
    """
    for repetition in range(rounds):
        for offload in OFFLOADS:
            yield {
                **SMALL,
                "method": "uniform",
                "offload": offload,
                "seed": repetition,
                "warmup": 5,
                "steps": 25,
                "prepare-state": True,
            }


def gpu_cells(rounds: int) -> Iterator[Cell]:
    """The paper's models on one device; with several GPUs also on ZeRO-3, one rank per GPU.

    ``grass`` probes, so its memory counts; places of the state are compared among ``uniform``, which draws the same layers whatever
    the device rounds. The state of all layers would not fit on the device: ``none`` makes it when a layer is drawn (``first_steps``).
    """
    gpus = get_accelerator().device_count()
    models = ("tinyllama-random", "gemma-2b-random", "llama2-7b-random")
    for seed, model, batch in product(range(rounds), models, (1, 4)):
        common = {
            "kind": "cost",
            "model": model,
            "ranks": 1,
            "micro-batch": batch,
            "sequence": 1024,
            "checkpointing": True,
            "grass": {"sample_period": 5},
            "warmup": 5,
            "steps": 25,
            "seed": seed,
        }
        for method in ("full", "lora", "lisa", "grass"):
            yield {**common, "method": method, "stage": 2}
        for offload in ("none", "cpu-stream", "cpu-stream-serial"):
            prepared = {"prepare-state": True} if offload != "none" else {}
            yield {**common, "method": "uniform", "stage": 2, "offload": offload, **prepared}
        if gpus > 1:
            for method in ("full", "lora", "lisa", "grass"):
                yield {**common, "method": method, "stage": 3, "ranks": gpus}
