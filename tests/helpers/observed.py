# SPDX-License-Identifier: Apache-2.0
"""What makes up a run at one step, and where two runs differ. Run inside a rank."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from helpers.models import snapshot


@contextmanager
def fp16_allowed() -> Iterator[None]:
    """gloo and the CPU kernels can; DeepSpeed's CPU accelerator says no."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    had = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        accelerator.is_fp16_supported = had


@contextmanager
def logged(part: str = "", level: int = logging.WARNING) -> Iterator[list[str]]:
    """The messages with ``part`` that DeepSpeed's logger shows inside."""
    from deepspeed.utils import logger

    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if part in record.getMessage():
                messages.append(record.getMessage())

    collector = Collector(level)
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)


@contextmanager
def early_gathers_allowed() -> Iterator[None]:
    """ZeRO-3 on CPU ranks with a DeepSpeed that is refused there, for tests that gather one weight at a time."""
    from grass_ds.core import deepspeed_compat

    had = deepspeed_compat.waits_for_all_gathers
    deepspeed_compat.waits_for_all_gathers = lambda: True
    try:
        yield
    finally:
        deepspeed_compat.waits_for_all_gathers = had


def optimizer_state(engine: Any) -> dict[str, Any]:
    """Unit -> master, moments and scalars of this rank's shard, copied."""
    store = engine.optimizer.store
    return {
        unit.name: copy.deepcopy({"master": store[unit].master, **store[unit].moments, **store[unit].scalars})
        for unit in engine.optimizer.units
        if unit in store
    }


def observe(engine: Any) -> dict[str, Any]:
    """Everything that makes up a run at one step."""
    grass = engine.grass
    return {
        "weights": snapshot(engine.module),
        "state": optimizer_state(engine),
        "phase": grass.phase,
        "active": grass.active_layers,
        "trainable": sorted(name for name, param in engine.module.named_parameters() if param.requires_grad),
        "scores": grass.scores,
        "probabilities": grass.probabilities,
        "visits": grass.visits,
        "input_squares": grass.state_dict()["input_squares"],
        "fingerprint": engine.optimizer.controller.fingerprint(),
        "lr": engine.get_lr(),
        "loss_scale": engine.optimizer.loss_scale,
        "steps": (engine.global_steps, engine.skipped_steps),
    }


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """Where two observations, nested or of several ranks, differ first; None if they are equal bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{path}: {sorted(map(str, one.keys() ^ other.keys()))} only on one side"
        return next((found for key in one if (found := difference(one[key], other[key], f"{path}/{key}"))), None)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return difference(dict(enumerate(one)), dict(enumerate(other)), path)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
        return None if same else f"{path}: tensors differ"
    return None if one == other else f"{path}: {one!r} != {other!r}"
