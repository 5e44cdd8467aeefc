# SPDX-License-Identifier: Apache-2.0
"""The suites: which cells each one runs, in which order. A cell is the arguments of ``cell.py``."""

from collections.abc import Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator

from benchmarks.places import OFFLOADS

Cell = dict[str, Any]
COST_METHODS = ("full", "lora", "grass", "uniform", "grass-embed")
# What a user of ZeRO-3 would choose from, and the same on ZeRO-2.
ZERO3_METHODS = (
    ("full", 3),
    ("grass", 3),
    ("uniform", 3),
    ("badam", 3),
    ("badam-package", 3),
    ("full-sampler", 3),
    ("full", 2),
    ("grass", 2),
)


def cost_cells(rounds: int) -> Iterator[Cell]:
    """Rounds outermost, so that a slow minute of the machine hits all methods."""
    for repetition in range(rounds):
        for method in COST_METHODS:
            yield {
                "kind": "cost",
                "method": method,
                "seed": repetition,
                "ranks": 2,
                "micro-batch": 2,
                "sequence": 128,
                "steps": 8,
            }


def offload_cells(rounds: int) -> Iterator[Cell]:
    """Every place of the optimizer state. One seed per round, so that all variants step the same layers.

    The sampler is ``uniform``: what is drawn then depends on nothing but the seed. One switch in five steps is five times as many as
    by default: switches are what ``period`` pays for.
    """
    for repetition in range(rounds):
        for offload in OFFLOADS:
            yield {
                "kind": "cost",
                "method": "uniform",
                "offload": offload,
                "seed": repetition,
                "ranks": 2,
                "micro-batch": 2,
                "sequence": 128,
                "grass": {"sample_period": 5},
                "warmup": 5,
                "steps": 25,
                "prepare-state": True,
            }


def zero3_cells(rounds: int, shape: Cell | None = None) -> Iterator[Cell]:
    """Sharded weights, against stock ZeRO-3 and BAdam's package. One switch in five steps, more than anybody wants: five are measured.

    Args:
        shape: model, ranks, batch and sequence; default: SmolLM2 on two ranks.
    """
    shape = shape or {"ranks": 2, "micro-batch": 2, "sequence": 128}
    for repetition in range(rounds):
        for method, stage in ZERO3_METHODS:
            yield {
                "kind": "cost",
                "method": method,
                "stage": stage,
                "seed": repetition,
                **shape,
                "grass": {"sample_period": 5},
                "warmup": 5,
                "steps": 25,
            }


def zero3_gpu_cells(rounds: int, model: str = "llama2-7b-random") -> Iterator[Cell]:
    """The same on a LLaMA-2-7B shape, one rank per GPU of this machine."""
    ranks = max(1, get_accelerator().device_count())
    shape = {"model": model, "ranks": ranks, "micro-batch": 1, "sequence": 1024, "checkpointing": True}
    yield from zero3_cells(rounds, shape)


def gpu_cells(rounds: int, model: str = "llama2-7b-random") -> Iterator[Cell]:
    """The paper's model on one device. ``grass`` probes, so its memory counts; times are compared among ``uniform``, which draws
    the same layers whatever the device rounds.

    The state of all layers would not fit on the device: ``none`` makes it when a layer is drawn (``first_steps`` in the row).
    """
    common = {
        "kind": "cost",
        "model": model,
        "ranks": 1,
        "micro-batch": 1,
        "sequence": 1024,
        "checkpointing": True,
        "grass": {"sample_period": 5},
        "warmup": 5,
        "steps": 25,
    }
    for repetition in range(rounds):
        for method in ("full", "lora", "grass"):
            yield {**common, "method": method, "seed": repetition}
        for offload in ("none", "cpu-stream", "cpu-period"):
            prepared = {"prepare-state": True} if offload != "none" else {}
            yield {**common, "method": "uniform", "offload": offload, "seed": repetition, **prepared}
