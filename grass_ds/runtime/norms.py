# SPDX-License-Identifier: Apache-2.0
"""Gradient norms: one all-reduce per step gives the global norm, overflow and the importance of every layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from grass_ds.runtime.gradients import GradientReducer
from grass_ds.runtime.units import Unit


def global_squares(
    reducer: GradientReducer, units: Sequence[Unit], group: Any
) -> tuple[dict[Unit, float], dict[Unit, float]]:
    """Squared norms per unit over all ranks, loss scale included: (of the accumulated gradient, summed over its micro-steps).

    One all-reduce of len(units) float32, twice that when several micro-steps were accumulated. Non-finite if any rank's are.
    """
    if not reducer.squares:
        raise RuntimeError("step() without a backward() before it: there are no gradients")
    local = [reducer.squares[unit] for unit in units]
    if reducer.shards:  # measured here, not as they arrived: the user may have replaced them (safe_set_full_grad)
        norms = [torch.linalg.vector_norm(reducer.shards[unit], dtype=torch.float32).square() for unit in units]
        local = norms + local if reducer.micro_steps > 1 else norms  # in a single micro-step the two are the same
    total = torch.stack(local)
    dist.all_reduce(total, group=group)
    values, count = total.tolist(), len(units)
    return dict(zip(units, values[:count], strict=True)), dict(zip(units, values[-count:], strict=True))


def layer_rms(squares: Mapping[Unit, float], micro_steps: int, loss_scale: float) -> dict[int, float]:
    """Layer -> root mean square of its gradient's elements over micro-batches: the paper's sqrt(||g||^2 / N).

    The loss of a micro-batch carries 1 / micro_steps, which is undone here, so that the value does not depend on the accumulation.
    """
    total: dict[int, float] = {}
    numel: dict[int, int] = {}
    for unit, square in squares.items():
        if unit.layer is not None:
            total[unit.layer] = total.get(unit.layer, 0.0) + square
            numel[unit.layer] = numel.get(unit.layer, 0) + unit.numel
    return {layer: math.sqrt(total[layer] * micro_steps / numel[layer]) / loss_scale for layer in total}
