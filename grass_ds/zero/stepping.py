# SPDX-License-Identifier: Apache-2.0
"""The client optimizer's own step, on one unit's shard at a time."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.store import StateStore


@dataclass(frozen=True)
class StepSettings:
    """Settings of the DeepSpeed config that shape a step.

    Attributes:
        stage: ZeRO stage.
        clip_grad: largest global gradient norm, 0 for no clipping.
        reset_on_switch: ``state_on_switch: reset``.
        accumulation_steps: gives the engine's ``gradient_accumulation_steps``, by which it divides every loss.
        at_boundary: whether this micro-batch is the last of its window, the engine's ``is_gradient_accumulation_boundary``.
        optional_kinds: of units that may go without a gradient: those that train by default, not because the user said so. None:
            all (``missing_gradients: zero``).
        loss_scale, dynamic_loss_scale, dynamic_loss_args: DeepSpeed's fp16 settings.
    """

    stage: int
    clip_grad: float
    reset_on_switch: bool
    accumulation_steps: Callable[[], int] = lambda: 1
    at_boundary: Callable[[], bool] = lambda: True
    optional_kinds: Collection[str] | None = ()
    loss_scale: float = 1.0
    dynamic_loss_scale: bool = False
    dynamic_loss_args: Mapping[str, Any] | None = None


def step_unit(
    unit: Unit, gradient: torch.Tensor, factor: float, optimizer: torch.optim.Optimizer, store: StateStore
) -> None:
    """Step the unit's fp32 master weights chunk by chunk, and write them into its low-precision shard.

    The client's param groups stay hyper-parameters; the unit's one holds a chunk for the length of a step.

    Args:
        gradient: averaged gradient of the shard, [shard_numel], any floating dtype.
        factor: multiplies the gradient in fp32: undoes the loss scale and clips.
    """
    group = optimizer.param_groups[unit.group]
    for chunk in store.chunks(unit):
        with store.on_device(chunk, optimizer) as master:
            part = chunk.of(gradient).to(torch.float32)
            master.grad = part.mul_(factor) if factor != 1.0 else part
            groups, optimizer.param_groups = optimizer.param_groups, [group]
            group["params"] = [master]
            try:
                optimizer.step()
            finally:
                group["params"], optimizer.param_groups = [], groups
                master.grad = None
            chunk.of(unit.shard).copy_(master)
