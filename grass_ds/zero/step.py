# SPDX-License-Identifier: Apache-2.0
"""One optimizer step: all units' gradient norms in one all-reduce, and the client optimizer's step on one shard."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from grass_ds.config import GrassConfig
from grass_ds.core.agreement import RankDivergenceError
from grass_ds.core.durable_files import listed
from grass_ds.core.rounding import add_rounded_stochastically
from grass_ds.core.signs import PER_BYTE, unpack_signs
from grass_ds.core.units import Unit
from grass_ds.offload.store import StateStore
from grass_ds.zero.gradients import GradientReducer, squared_norm

PIECE = 2**20  # elements of a shard that take their sign step together; another size would draw other random numbers
# Of temporary memory per element of a piece, by the dtype of the weights.
PIECE_BYTES = {torch.float32: 8, torch.bfloat16: 10, torch.float16: 22}


class MissingGradientError(ValueError):
    """Active modules received no gradient on any rank in a whole accumulation window."""


def step_unit(
    unit: Unit, gradient: torch.Tensor, factor: float, optimizer: torch.optim.Optimizer, store: StateStore, step: int
) -> None:
    """Step the unit's fp32 master weights chunk by chunk; its low-precision shard follows.

    The unit's param group holds one chunk during its step, and is otherwise empty. ``factor`` multiplies the averaged
    ``gradient`` [shard_numel] in fp32: it undoes the loss scale and clips. ``step``: see :meth:`StateStore.on_device`.
    """
    group = optimizer.param_groups[unit.group]
    for chunk in store.chunks(unit):
        with store.on_device(chunk, optimizer, step) as master:
            part = chunk.of(gradient).to(torch.float32)
            master.grad = part.mul_(factor) if factor != 1.0 else part
            groups, optimizer.param_groups = optimizer.param_groups, [group]
            group["params"] = [master]
            try:
                optimizer.step()
            finally:
                group["params"], optimizer.param_groups = [], groups
                master.grad = None


def expand_unit(unit: Unit, signs: torch.Tensor, rate: float, generator: torch.Generator) -> None:
    """Move an inactive unit's low-precision shard by ``rate`` against the signs of its gradient, see ``pack_signs``.

    Rounding needs :data:`PIECE_BYTES`, so one piece at a time.
    """
    for weights, packed in zip(unit.shard.split(PIECE), signs.split(PIECE // PER_BYTE), strict=True):
        moved = weights.to(packed.device)
        add_rounded_stochastically(moved, unpack_signs(packed, len(weights)).mul_(-rate), generator)
        if moved is not weights:  # in host memory by offload_param
            weights.copy_(moved)


def global_squares(
    reducer: GradientReducer, units: Sequence[Unit], group: Any, config: GrassConfig
) -> tuple[dict[Unit, float], dict[Unit, float]]:
    """Squared gradient norms per unit over all ranks, loss scale included: one all-reduce of 3 len(units) + 2 float32.

    Returns:
        (of the accumulated gradient, of the micro-batches' gradients, summed); 0 if all ranks have discarded theirs.

    Raises:
        RuntimeError: there was no backward pass.
        RankDivergenceError: ranks have accumulated different numbers of micro-batches.
        MissingGradientError: units without a gradient on any rank. Raised on every rank.
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
            f"ranks have accumulated different numbers of micro-batches (this one {steps}): zero_grad() was called on "
            "some ranks only. Decide on all ranks alike, for example by the loss averaged over them"
        )
    if steps and config.missing_gradients == "error":
        arrived = zip(units, values[2 * count :], strict=False)
        missing = [unit for unit, ranks in arrived if not ranks and not unit.expanded]
        optional = _OPTIONAL_KINDS if config.always_active is None or config.sampler == "full" else ()
        _refuse_missing([unit for unit in missing if unit.kind not in optional], len(units))
        _warn_of_missing(reducer, missing)
    return dict(zip(units, values[:count], strict=True)), dict(zip(units, values[count : 2 * count], strict=True))


def _local_squares(reducer: GradientReducer, units: Sequence[Unit]) -> list[torch.Tensor]:
    """This rank's part, float32 scalars: of the accumulated gradients, then of the micro-steps' summed; per unit."""
    if not reducer.micro_steps:
        return [torch.zeros((), device=unit.device) for unit in units] * 2
    squares = [reducer.squares[unit] for unit in units]
    if not reducer.shards:  # probing keeps none
        return squares * 2
    # Measured here, not as they arrived: the user may have replaced them (safe_set_full_grad).
    norms = [reducer.squares[unit] if unit.expanded else squared_norm(reducer.shards[unit]) for unit in units]
    return norms + squares if reducer.micro_steps > 1 else norms * 2  # of a single micro-step the two are the same


def layer_rms(
    squares: Mapping[Unit, float], reducer: GradientReducer, accumulation: int, loss_scale: float
) -> dict[int, float]:
    """Layer -> root mean square of its gradient's elements over micro-batches: the paper's sqrt(||g||^2 / N).

    Args:
        reducer: which micro-batches are in ``squares``.
        accumulation: the configured steps. The loss of a micro-batch carries the factor 1 / steps, which is undone
            here, so that importance does not depend on the accumulation length.
    """
    micro_steps = reducer.micro_steps
    window = max(micro_steps, accumulation) if reducer.discarded else micro_steps
    total: defaultdict[int, float] = defaultdict(float)
    numel: defaultdict[int, int] = defaultdict(int)
    for unit, square in squares.items():
        if unit.layer is not None and not unit.expanded:
            total[unit.layer] += square
            numel[unit.layer] += unit.numel
    scale = window * window / micro_steps
    return {layer: math.sqrt(total[layer] * scale / numel[layer]) / loss_scale for layer in total}


# They may have no gradient if they train by default rather than by the user's choice. Blocks and the final norm need one.
_OPTIONAL_KINDS = ("embed", "head", "other", "tower")


def _refuse_missing(missing: Sequence[Unit], active: int) -> None:
    if not missing:
        return
    unused = (
        "no row of this step uses the module (a projector, a router), or it is dropped at random (LayerDrop): if that "
        'is meant, set "grass": {"missing_gradients": "zero"}; if it is never used, leave its kind out of '
        "grass.always_active"
    )
    reentrant = (
        "the model calls torch.utils.checkpoint with use_reentrant=True, which drops the gradient of a block whose "
        "input needs none, as below embeddings that do not train: pass use_reentrant=False, call "
        'model.enable_input_require_grads(), or add "embed" to grass.always_active'
    )
    causes = [reentrant] if any(unit.layer is not None for unit in missing) else []
    causes += [unused, "forward detaches the output, or runs under no_grad"]
    numbered = "; ".join(f"({number}) {cause}" for number, cause in enumerate(causes, start=1))
    raise MissingGradientError(
        f"{len(missing)} of {active} active modules received no gradient on any rank since the last step: "
        f"{_listed(missing)}. Nothing was updated. Likely causes: {numbered}"
    )


def _warn_of_missing(reducer: GradientReducer, missing: Sequence[Unit]) -> None:
    """One warning per module, for example a pooler that no loss uses. DeepSpeed trains such models silently."""
    new = [unit for unit in missing if unit not in reducer.warned]
    reducer.warned.update(new)
    if new and dist.get_rank() == 0:
        logger.warning(
            f"grass_ds: no gradient reached {_listed(new)}, which trains by default; as in DeepSpeed it counts as zeros. "
            "If it is never used, name what is to train in grass.always_active; a new output layer that is not used will "
            "stay random"
        )


def _listed(units: Sequence[Unit]) -> str:
    names = [*dict.fromkeys(u.name.rpartition("/")[0] if u.layer is not None else u.param_names[0] for u in units)]
    return listed(names, most=6)
