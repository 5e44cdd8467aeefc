# SPDX-License-Identifier: Apache-2.0
"""Gradient norms: one all-reduce per step gives the global norm, overflow and the importance of every layer."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from grass_ds.core.agreement import RankDivergenceError
from grass_ds.core.units import Unit
from grass_ds.zero.gradients import GradientReducer


class MissingGradientError(ValueError):
    """Modules that are to train received no gradient on any rank in a whole accumulation window."""


def global_squares(
    reducer: GradientReducer, units: Sequence[Unit], group: Any, optional_kinds: Collection[str] | None = ()
) -> tuple[dict[Unit, float], dict[Unit, float]]:
    """Squared norms per unit over all ranks, loss scale included: (of the accumulated gradient, summed over its micro-steps).

    One all-reduce of 3 len(units) + 2 float32. Norms are non-finite if any rank's are, and 0 if all ranks have discarded what they had.

    Args:
        optional_kinds: of units outside the blocks that may go without a gradient: it counts as zeros, and a warning says so once. None:
            every unit may, and nothing is said.

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
    if steps and optional_kinds is not None:
        missing = [unit for unit, ranks in zip(units, values[2 * count :], strict=False) if not ranks]
        _check_arrivals([unit for unit in missing if unit.kind not in optional_kinds], len(units))
        _warn_of_missing(reducer, missing)
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
    unused = (
        "no row of this step uses the module (a projector, a router), or it is dropped at random (LayerDrop): if that is meant, set "
        '"grass": {"missing_gradients": "zero"}; if it is never used, leave its kind out of grass.always_active'
    )
    causes = [unused, "forward detaches the output, or runs under no_grad"]
    if any(unit.layer is not None for unit in missing):
        reentrant = (
            "the model calls torch.utils.checkpoint with use_reentrant=True, which drops the gradient of a block whose input needs none, "
            "as below embeddings that do not train: pass use_reentrant=False, call model.enable_input_require_grads(), or add "
            '"embed" to grass.always_active'
        )
        causes.insert(0, reentrant)
    numbered = "; ".join(f"({number}) {cause}" for number, cause in enumerate(causes, start=1))
    raise MissingGradientError(
        f"{len(missing)} of {active} active modules received no gradient on any rank since the last step: {_listed(missing)}. Nothing was "
        f"updated. Likely causes: {numbered}"
    )


def _warn_of_missing(reducer: GradientReducer, missing: Sequence[Unit]) -> None:
    """Once per module. A pooler that nobody uses, say: DeepSpeed trains such models without a word."""
    new = [unit for unit in missing if unit not in reducer.warned]
    reducer.warned.update(new)
    if new and dist.get_rank() == 0:
        logger.warning(
            f"grass_ds: no gradient reached {_listed(new)}, which trains by default; as in DeepSpeed it counts as zeros. If it is never used, "
            "name what is to train in grass.always_active; a new output layer that is not used will stay random"
        )


def _listed(units: Sequence[Unit]) -> str:
    names = [*dict.fromkeys(u.name.rpartition("/")[0] if u.layer is not None else u.param_names[0] for u in units)]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


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
