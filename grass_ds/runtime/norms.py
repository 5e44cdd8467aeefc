# SPDX-License-Identifier: Apache-2.0
"""Gradient norms: one all-reduce per step gives the global norm, overflow and the importance of every layer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from grass_ds.runtime.agreement import RankDivergenceError
from grass_ds.runtime.gradients import GradientReducer
from grass_ds.runtime.units import Unit


class MissingGradientError(ValueError):
    """Modules that are to train received no gradient on any rank in a whole accumulation window."""


def global_squares(
    reducer: GradientReducer, units: Sequence[Unit], group: Any, allow_missing: bool = False
) -> tuple[dict[Unit, float], dict[Unit, float]]:
    """Squared norms per unit over all ranks, loss scale included: (of the accumulated gradient, summed over its micro-steps).

    One all-reduce of 3 len(units) + 2 float32. Norms are non-finite if any rank's are, and 0 if all ranks have discarded what they had.

    Args:
        allow_missing: a unit without any gradient counts as one with zeros.

    Raises:
        RuntimeError: there was no backward pass.
        RankDivergenceError: ranks have accumulated different numbers of micro-batches.
        MissingGradientError: units without a gradient on any rank; alike on every rank.
    """
    if not (reducer.micro_steps or reducer.discarded):
        raise RuntimeError("step() without a backward() before it: there are no gradients")
    steps, squares = reducer.micro_steps, torch.stack(_local_squares(reducer, units))
    counts = [*(float(unit in reducer.arrived) for unit in units), float(steps), float(steps * steps)]
    total = torch.cat([squares, torch.tensor(counts, device=squares.device)])
    dist.all_reduce(total, group=group)
    values, count = total.tolist(), len(units)
    # The numbers of all ranks are equal exactly if the mean of their squares is the square of their mean.
    if dist.get_world_size(group=group) * values[-1] != values[-2] ** 2:
        raise RankDivergenceError(
            f"ranks have accumulated different numbers of micro-batches (this one {steps}): zero_grad() was called on some ranks "
            "only. Decide on all ranks alike, for example by the loss averaged over them"
        )
    if steps and not allow_missing:
        _check_arrivals(
            [unit for unit, ranks in zip(units, values[2 * count :], strict=False) if not ranks], len(units)
        )
    return dict(zip(units, values[:count], strict=True)), dict(zip(units, values[count : 2 * count], strict=True))


def _local_squares(reducer: GradientReducer, units: Sequence[Unit]) -> list[torch.Tensor]:
    """This rank's part, float32 scalars: per unit of the accumulated gradient, then per unit summed over micro-steps."""
    if not reducer.micro_steps:
        return [torch.zeros((), device=unit.device) for unit in units] * 2
    squares = [reducer.squares[unit] for unit in units]
    if not reducer.shards:  # probing keeps none
        return squares * 2
    # Measured here, not as they arrived: the user may have replaced them (safe_set_full_grad).
    norms = [torch.linalg.vector_norm(reducer.shards[unit], dtype=torch.float32).square() for unit in units]
    return norms + squares if reducer.micro_steps > 1 else norms * 2  # in a single micro-step the two are the same


def _check_arrivals(missing: Sequence[Unit], active: int) -> None:
    if not missing:
        return
    names = dict.fromkeys(
        unit.name.rpartition("/")[0] if unit.layer is not None else unit.param_names[0] for unit in missing
    )
    listed = ", ".join([*names][:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    raise MissingGradientError(
        f"{len(missing)} of {active} active modules received no gradient on any rank since the last step: {listed}. Nothing was updated. "
        "Likely causes: (1) the model calls torch.utils.checkpoint with use_reentrant=True, which drops the gradient of a block whose "
        "input needs none, as below embeddings that do not train: pass use_reentrant=False, call "
        'model.enable_input_require_grads(), or add "embed" to grass.always_active; (2) forward detaches the output, or runs under '
        "no_grad; (3) no row of this step uses the module: if that is meant, set "
        '"grass": {"missing_gradients": "zero"}, and if it never is used, leave its kind out of grass.always_active'
    )


def layer_rms(squares: Mapping[Unit, float], micro_steps: int, window: int, loss_scale: float) -> dict[int, float]:
    """Layer -> root mean square of its gradient's elements over micro-batches: the paper's sqrt(||g||^2 / N).

    Args:
        micro_steps: micro-batches in ``squares``.
        window: the loss of a micro-batch carries 1 / window. That is undone here, so that the value does not depend on the accumulation.
    """
    total: dict[int, float] = {}
    numel: dict[int, int] = {}
    for unit, square in squares.items():
        if unit.layer is not None:
            total[unit.layer] = total.get(unit.layer, 0.0) + square
            numel[unit.layer] = numel.get(unit.layer, 0) + unit.numel
    scale = window * window / micro_steps
    return {layer: math.sqrt(total[layer] * scale / numel[layer]) / loss_scale for layer in total}
