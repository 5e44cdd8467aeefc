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
TIMED: Cell = {**SMALL, "plain": True}
# As many steps to a draw as by default: ZeRO-3 traces the first step of every new lowest layer, which fewer would make look dear.
ZERO3: Cell = {"stage": 3, "grass": {"sample_period": 25}}
SAMPLED = ("grass", "uniform", "cyclic")
# What a user would pick instead: method, ZeRO stage.
STOCK = (
    ("full", 2),
    ("full", 3),
    ("lora", 2),
    ("lora-fa", 2),
    ("lisa-toggle", 2),
)


def cpu_cells(rounds: int) -> Iterator[Cell]:
    """The cost suite: what users choose between in interleaved rounds, its variants in the first, and how cost grows, once.

    Rounds are outermost, so that a slow minute of the machine hits all methods.
    """
    for repetition in range(rounds):
        yield from _core_cells(repetition)
        if repetition == 0:
            yield from _variant_cells()
    yield from growth_cells()


def _core_cells(seed: int) -> Iterator[Cell]:
    """All methods as they are by default."""
    for method, stage in STOCK:
        yield {**TIMED, "method": method, "stage": stage, "seed": seed, "steps": 8}
    for method in SAMPLED:
        # What a step costs depends on the layers drawn.
        yield {**TIMED, "method": method, "stage": 2, "seed": seed, "steps": 20}
    yield {**TIMED, **ZERO3, "method": "badam-package", "seed": seed, "steps": 27}
    yield {**TIMED, **ZERO3, "method": "grass", "seed": seed, "steps": 50}


def _variant_cells() -> Iterator[Cell]:
    """Other stages, offload, always-active sets, accumulation and checkpointing: once each, beside the first round."""
    for method in ("full-offload", "lora-16"):
        yield {**TIMED, "method": method, "stage": 2, "seed": 0, "steps": 8}
    for method in SAMPLED:
        yield {**TIMED, "method": method, "stage": 1, "seed": 0, "steps": 10}
    for method in ("uniform", "cyclic"):
        yield {**TIMED, **ZERO3, "method": method, "seed": 0, "steps": 50}
    for method, stage, offload in product(SAMPLED, ({"stage": 1}, {"stage": 2}, ZERO3), ("none", "nvme-stream")):
        yield {**SMALL, **stage, "method": method, "offload": offload, "seed": 0, "steps": 6}
    # SmolLM2's head is its embeddings: {norm, head} trains the same as {embed, norm, head}.
    for method in ("full-sampler", "lisa", "grass-embed"):
        yield {**TIMED, "method": method, "stage": 2, "seed": 0, "steps": 5 if method == "full-sampler" else 10}
    for place in ({}, {"offload": "none"}):
        yield {**SMALL, **place, "method": "grass", "stage": 2, "seed": 0, "prepare-state": True, "steps": 10}
    for method in ("full", "lora", "grass"):
        yield {**TIMED, "method": method, "stage": 2, "seed": 0, "accumulation": 4, "steps": 4}
    for method in ("full", "lora", "grass"):
        steps = 10 if method == "grass" else 5
        yield {**TIMED, "method": method, "stage": 2, "seed": 0, "checkpointing": True, "steps": steps}


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
