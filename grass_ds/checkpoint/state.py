# SPDX-License-Identifier: Apache-2.0
"""State dict of the ZeRO wrapper: DeepSpeed's own schema, with one flat group per unit, and the key ``"grass"``.

DeepSpeed's tools (``zero_to_fp32.py``, ``ds_to_universal.py``) read the stock keys. ``"grass"`` holds what they do not
know: which units have state, and the sampler. The tools expect state of every unit. A unit that was never stepped gets
zero moments, each stored as one number with a stride of 0, and its low-precision weights as fp32.

[Note: Compact states] With another ``offload.state_format`` than fp32 the stock keys hold the low-precision weights
and no moments, and ``"grass"`` holds what the format keeps. :func:`expand` makes of it a state dict of fp32 states.
"""

import copy
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.checkpoint.selection import check_layout, layout
from grass_ds.checkpoint.universal import WEIGHTS, UniversalCheckpoint
from grass_ds.core.agreement import raise_on_all_ranks
from grass_ds.core.deepspeed_compat import checkpoint_keys as keys
from grass_ds.core.deepspeed_compat import fragment_address
from grass_ds.core.units import Unit
from grass_ds.offload.store import StateStore, UnitState, unpack
from grass_ds.sampling.controller import Controller

GRASS = "grass"
STORED = "stored"  # compact states by the name of the unit
INPUT_SQUARES = "input_squares"  # of a probing that measures outliers


class ShardedOptimizer(Protocol):
    """The attributes of the ZeRO wrapper that are saved."""

    units: list[Unit]
    store: StateStore
    controller: Controller
    outliers: Any  # state_dict() and load_state_dict()
    stage: int
    param_groups: list[dict[str, Any]]
    loss_scaler: Any
    dynamic_loss_scale: bool
    overflow: bool
    clip_grad: float
    skips: int  # consecutive steps without an update
    dp_process_group: Any
    device: torch.device

    def refresh_fp32_params(self) -> None:
        """Set the master weights to the low-precision ones."""


def save(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """State dict of this rank. Tensors stay on their devices; shards come without padding."""
    get_accelerator().synchronize()
    optimizer.store.flush()
    units, store = optimizer.units, optimizer.store
    stored = {unit.name: kept for unit in units if unit in store and (kept := store.stored(unit)) is not None}
    states = {unit: _saved_state(unit, store, unit.name in stored) for unit in units}
    hyper = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    base = {
        "state": {unit.index: {**state.scalars, **state.moments} for unit, state in states.items()},
        "param_groups": [{**hyper[unit.group], "params": [unit.index]} for unit in units],
    }
    masters = [state.master for state in states.values()]
    return {
        keys.ZERO_STAGE: optimizer.stage,
        keys.LOSS_SCALER: optimizer.loss_scaler,
        "dynamic_loss_scale": optimizer.dynamic_loss_scale,
        "overflow": optimizer.overflow,
        **dict(zip(_state_keys(optimizer.stage), (base, masters), strict=True)),
        **(_slices(units) if optimizer.stage < 3 else {keys.PARTITION_COUNT: units[0].world}),
        keys.CLIP_GRAD: optimizer.clip_grad,
        keys.DS_VERSION: deepspeed.__version__,
        GRASS: {
            "controller": optimizer.controller.state_dict(),
            INPUT_SQUARES: optimizer.outliers.state_dict(),
            "layout": layout(units),
            "param_groups": hyper,
            "skips": optimizer.skips,
            STORED: stored,
            "stepped": {unit.name: state.scalars for unit, state in states.items() if unit in store},
        },
    }


def _state_keys(stage: int) -> tuple[str, str]:
    """DeepSpeed's keys of the states and of the master weights."""
    if stage == 3:
        return keys.OPTIMIZER_STATE_DICT, keys.FP32_FLAT_GROUPS
    return keys.BASE_OPTIMIZER_STATE, keys.SINGLE_PARTITION_OF_FP32_GROUPS


def _slices(units: list[Unit]) -> dict[str, Any]:
    """Where the parameters of stages 1 and 2 are in this rank's shards, for ``ds_to_universal.py``."""
    overlaps = [[(name, unit.overlap(slot)) for slot, name in enumerate(unit.param_names)] for unit in units]
    return {
        keys.GROUP_PADDINGS: [0] * len(units),  # the converter cuts off that many elements of every state
        keys.PARTITION_COUNT: [unit.world for unit in units],
        keys.PARAM_SLICE_MAPPINGS: [
            OrderedDict((name, fragment_address(numel=n, start=start)) for name, (_, start, n) in params if n)
            for params in overlaps
        ],
    }


def _saved_state(unit: Unit, store: StateStore, compact: bool) -> UnitState:
    """What the stock keys say of the unit, without padding; the state of its first step if it was never stepped."""
    if compact:
        return UnitState(_unpadded(unit, unit.shard).clone(), {}, store.scalars(unit))
    if unit in store:
        return store[unit].map(partial(_unpadded, unit))
    template = store.template(unit)
    # A copy: a view of fp32 weights would be saved with the whole storage, which holds the shards of all ranks.
    master = _unpadded(unit, unit.shard).to(torch.float32, copy=True)
    zeros = torch.zeros(()).expand(unit.saved_numel)
    return UnitState(master, dict.fromkeys(template.moments, zeros), copy.deepcopy(dict(template.start or {})))


def _unpadded(unit: Unit, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()[: unit.saved_numel]


def _padded(unit: Unit, tensor: torch.Tensor) -> torch.Tensor:
    return nn.functional.pad(tensor.to(torch.float32), (0, unit.shard_numel - unit.saved_numel))


def load(
    optimizer: ShardedOptimizer,
    state_dict_list: list[dict[str, Any]] | None,
    load_optimizer_states: bool,
    load_from_fp32_weights: bool = True,
    checkpoint_folder: str | None = None,
    **_: Any,
) -> None:
    """Restore the state dict of :func:`save`, or only its weights. The engine restores the active set afterwards.

    Args:
        state_dict_list: one per rank, of a run with the same number of ranks; only this rank's is read.
        load_from_fp32_weights: False sets master weights to the low-precision ones; not of a universal one.
        checkpoint_folder: a universal checkpoint, saved by any number of ranks, to load instead.

    Raises:
        ValueError: the checkpoint is of plain DeepSpeed or of other layers, or a damaged universal one.
    """
    if checkpoint_folder is not None:
        # A file may be damaged where only one rank reads it.
        with raise_on_all_ranks(optimizer.dp_process_group, optimizer.device):
            _load_universal(optimizer, UniversalCheckpoint(Path(checkpoint_folder)), load_optimizer_states)
        return
    assert state_dict_list is not None
    saved = state_dict_list[dist.get_rank(group=optimizer.dp_process_group)]
    stepped = _check(optimizer, saved, "the checkpoint")
    states, masters = (saved[key] for key in _state_keys(optimizer.stage))
    if optimizer.stage == 3:  # its checkpoints hold no other weights
        for unit, master in zip(optimizer.units, masters, strict=True):
            _unpadded(unit, unit.shard).copy_(master)
    if not load_optimizer_states:
        optimizer.store.clear()
        return
    _restore_progress(optimizer, saved)
    for unit, master in zip(optimizer.units, masters, strict=True):
        if unit.name in stepped:
            scalars = stepped[unit.name]
            moments = {k: v for k, v in states["state"][unit.index].items() if k not in scalars}
            state = UnitState(master, moments, scalars)
            if stored := saved[GRASS].get(STORED, {}).get(unit.name):
                state = unpack(stored, master, scalars)
            optimizer.store.put(unit, state.map(partial(_padded, unit)))
        else:
            optimizer.store.drop(unit)
    if not load_from_fp32_weights:
        optimizer.refresh_fp32_params()


def expand(saved: dict[str, Any]) -> None:
    """Make of a state dict with compact states one with fp32 states, in place: as :func:`save` gives it with fp32."""
    base, masters = (saved[key] for key in _state_keys(saved[keys.ZERO_STAGE]))
    stored = saved[GRASS].pop(STORED, {})
    for index, (name, _) in enumerate(saved[GRASS]["layout"]):
        if name in stored:
            state = unpack(stored[name], masters[index], saved[GRASS]["stepped"][name])
            masters[index] = state.master.clone()  # without the padding behind it
            base["state"][index] |= {key: moment.clone() for key, moment in state.moments.items()}
    saved[GRASS][STORED] = {}


def _load_universal(optimizer: ShardedOptimizer, checkpoint: UniversalCheckpoint, with_states: bool) -> None:
    """Load this rank's shards, also of the low-precision weights, which the engine copies to the model."""
    units, store = optimizer.units, optimizer.store
    saved = checkpoint.common() if with_states else {}
    stepped = _check(optimizer, saved, f"the checkpoint {checkpoint.folder.name}") if with_states else {}
    if with_states and saved[GRASS].get(STORED):
        raise ValueError(
            f"the universal checkpoint {checkpoint.folder.name} was made from one with a compact offload.state_format, whose "
            "moments the converter drops; run `python -m grass_ds expand CHECKPOINT OUTPUT` first, and convert OUTPUT"
        )
    moments = {unit: store.template(unit).moments if unit.name in stepped else () for unit in units}
    checkpoint.check(moments)
    if with_states:
        _restore_progress(optimizer, saved)
    for unit in units:
        tensors = {key: checkpoint.shard(unit, key) for key in (WEIGHTS, *moments[unit])}
        master = tensors.pop(WEIGHTS)
        unit.shard.copy_(master)
        if unit.name in stepped:
            store.put(unit, UnitState(master, tensors, stepped[unit.name]))
        else:
            store.drop(unit)


def _check(optimizer: ShardedOptimizer, saved: dict[str, Any], what: str) -> dict[str, Any]:
    """Refuse a state dict of another program or of other units. Returns the scalars of each stepped unit by name."""
    if GRASS not in saved:
        raise ValueError(
            "the checkpoint was not written by grass_ds, so its optimizer state has another layout and no sampler; load the "
            "weights alone with load_checkpoint(..., load_optimizer_states=False), or load_module_only=True if it is a "
            "universal one"
        )
    check_layout(what, optimizer.units, saved[GRASS]["layout"])
    return dict(saved[GRASS]["stepped"])


def _restore_progress(optimizer: ShardedOptimizer, saved: dict[str, Any]) -> None:
    ours = saved[GRASS]
    optimizer.controller.load_state_dict(ours["controller"])
    optimizer.outliers.load_state_dict(ours.get(INPUT_SQUARES))
    optimizer.loss_scaler = saved[keys.LOSS_SCALER]
    optimizer.dynamic_loss_scale = saved["dynamic_loss_scale"]
    optimizer.overflow = saved["overflow"]
    optimizer.skips = ours["skips"]
    for group, values in zip(optimizer.param_groups, ours["param_groups"], strict=True):
        group.update(values)
