# SPDX-License-Identifier: Apache-2.0
"""State dict of the ZeRO wrapper: DeepSpeed's own schema, with one flat group per unit, and the key ``"grass"``.

DeepSpeed's tools (``zero_to_fp32.py``, ``ds_to_universal.py``) read the stock keys. ``"grass"`` holds what they do not
know: which units have state, and the sampler. The tools expect state of every unit. A unit that was never stepped gets
zero moments, each stored as one number with a stride of 0, and its low-precision weights as fp32.
"""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from grass_ds.checkpoint.selection import check_layout, layout
from grass_ds.checkpoint.universal import WEIGHTS, UniversalCheckpoint
from grass_ds.core.agreement import raise_on_all_ranks
from grass_ds.core.deepspeed_compat import checkpoint_keys as keys
from grass_ds.core.deepspeed_compat import fragment_address
from grass_ds.core.units import Unit
from grass_ds.offload.store import StateStore, UnitState
from grass_ds.sampling.controller import Controller

GRASS = "grass"
_REPLICATED_KEYS = (keys.BASE_OPTIMIZER_STATE, keys.SINGLE_PARTITION_OF_FP32_GROUPS)


class ShardedOptimizer(Protocol):
    """The attributes of the ZeRO wrapper that are saved.

    Attributes:
        skips: number of consecutive steps without an update.
    """

    units: list[Unit]
    store: StateStore
    controller: Controller
    stage: int
    param_groups: list[dict[str, Any]]
    loss_scaler: Any
    dynamic_loss_scale: bool
    overflow: bool
    clip_grad: float
    skips: int
    dp_process_group: Any
    device: torch.device

    def refresh_fp32_params(self) -> None:
        """Set the master weights to the low-precision ones."""


def save(optimizer: ShardedOptimizer) -> dict[str, Any]:
    """State dict of this rank. Tensors stay on their devices; shards come without padding."""
    get_accelerator().synchronize()
    optimizer.store.flush()
    units = optimizer.units
    states = {unit: optimizer.store[unit] for unit in units if unit in optimizer.store}
    hyper = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    base = {
        "state": {
            unit.index: _saved_state(unit, states[unit]) if unit in states else _initial_state(unit, optimizer.store)
            for unit in units
        },
        "param_groups": [{**hyper[unit.group], "params": [unit.index]} for unit in units],
    }
    masters = [_unpadded(unit, states[unit].master) if unit in states else _initial_master(unit) for unit in units]
    stage = optimizer.stage
    return {
        keys.ZERO_STAGE: stage,
        keys.LOSS_SCALER: optimizer.loss_scaler,
        "dynamic_loss_scale": optimizer.dynamic_loss_scale,
        "overflow": optimizer.overflow,
        **(_partitioned(base, masters, units) if stage == 3 else _replicated(base, masters, units)),
        keys.CLIP_GRAD: optimizer.clip_grad,
        keys.DS_VERSION: deepspeed.__version__,
        GRASS: {
            "controller": optimizer.controller.state_dict(),
            "layout": layout(units),
            "param_groups": hyper,
            "skips": optimizer.skips,
            "stepped": {unit.name: state.scalars for unit, state in states.items()},
        },
    }


def _replicated(base: dict[str, Any], masters: list[torch.Tensor], units: list[Unit]) -> dict[str, Any]:
    """Keys of stages 1 and 2."""
    return {
        keys.BASE_OPTIMIZER_STATE: base,
        keys.SINGLE_PARTITION_OF_FP32_GROUPS: masters,
        keys.GROUP_PADDINGS: [0] * len(units),  # ds_to_universal.py cuts off that many elements of every state
        keys.PARTITION_COUNT: [unit.world for unit in units],
        keys.PARAM_SLICE_MAPPINGS: [_slices(unit) for unit in units],
    }


def _partitioned(base: dict[str, Any], masters: list[torch.Tensor], units: list[Unit]) -> dict[str, Any]:
    """Keys of stage 3."""
    return {
        keys.OPTIMIZER_STATE_DICT: base,
        keys.FP32_FLAT_GROUPS: masters,
        keys.PARTITION_COUNT: units[0].world,
    }


def load(
    optimizer: ShardedOptimizer,
    state_dict_list: list[dict[str, Any]] | None,
    load_optimizer_states: bool,
    load_from_fp32_weights: bool = True,
    checkpoint_folder: str | None = None,
    **_: Any,
) -> None:
    """Restore the state dict of :func:`save`. The engine restores the active set afterwards.

    Args:
        state_dict_list: one per rank, of a run with the same number of ranks; only this rank's is read.
        load_optimizer_states: False loads the weights alone.
        load_from_fp32_weights: False sets master weights to the low-precision ones; ignored for a universal
            checkpoint.
        checkpoint_folder: a universal checkpoint, saved by any number of ranks, to load instead.

    Raises:
        ValueError: the checkpoint is of plain DeepSpeed or of other layers, or a damaged universal one.
    """
    if checkpoint_folder is not None:
        _load_universal(optimizer, UniversalCheckpoint(Path(checkpoint_folder)), load_optimizer_states)
        return
    assert state_dict_list is not None
    saved = state_dict_list[dist.get_rank(group=optimizer.dp_process_group)]
    ours = _grass_entry(saved)
    check_layout("the checkpoint", optimizer.units, ours["layout"])
    stage = optimizer.stage
    base, masters = (keys.OPTIMIZER_STATE_DICT, keys.FP32_FLAT_GROUPS) if stage == 3 else _REPLICATED_KEYS
    if stage == 3:  # its checkpoints hold no other weights
        for unit, master in zip(optimizer.units, saved[masters], strict=True):
            _unpadded(unit, unit.shard).copy_(master)
    if not load_optimizer_states:
        optimizer.store.clear()
        return
    _restore_progress(optimizer, saved)
    states = saved[base]["state"]
    for unit, master in zip(optimizer.units, saved[masters], strict=True):
        if unit.name in ours["stepped"]:
            optimizer.store.put(unit, _padded_state(unit, master, states[unit.index]))
        else:
            optimizer.store.drop(unit)
    if not load_from_fp32_weights:
        optimizer.refresh_fp32_params()


def _load_universal(optimizer: ShardedOptimizer, checkpoint: UniversalCheckpoint, with_states: bool) -> None:
    """Load this rank's shards. All ranks raise together, since a file may be damaged where only one rank reads it.

    Weights go into this rank's shard of the low-precision ones; the engine copies them to the model.
    """
    with raise_on_all_ranks(optimizer.dp_process_group, optimizer.device):
        _load_shards(optimizer, checkpoint, with_states)


def _load_shards(optimizer: ShardedOptimizer, checkpoint: UniversalCheckpoint, with_states: bool) -> None:
    units, store = optimizer.units, optimizer.store
    saved = checkpoint.common() if with_states else {}
    stepped: dict[str, Any] = {}
    if with_states:
        ours = _grass_entry(saved)
        check_layout(f"the checkpoint {checkpoint.folder.name}", units, ours["layout"])
        stepped = ours["stepped"]
    moments = {unit: store.template(unit).moments if unit.name in stepped else () for unit in units}
    checkpoint.check(moments)
    if with_states:
        _restore_progress(optimizer, saved)
    for unit in units:
        if unit.name in stepped:
            state = checkpoint.state(unit, moments[unit], stepped[unit.name])
            store.put(unit, state)
            unit.shard.copy_(state.master)
        else:
            store.drop(unit)
            unit.shard.copy_(checkpoint.shard(unit, WEIGHTS))


def _grass_entry(saved: dict[str, Any]) -> dict[str, Any]:
    """The entry ``"grass"`` of a state dict.

    Raises:
        ValueError: there is none.
    """
    if GRASS not in saved:
        raise ValueError(
            "the checkpoint was not written by grass_ds, so its optimizer state has another layout and no sampler; load the "
            "weights alone with load_checkpoint(..., load_optimizer_states=False), or load_module_only=True if it is a "
            "universal one"
        )
    return saved[GRASS]


def _restore_progress(optimizer: ShardedOptimizer, saved: dict[str, Any]) -> None:
    """Restore loss scale, sampler and hyper-parameters."""
    ours = saved[GRASS]
    optimizer.controller.load_state_dict(ours["controller"])
    optimizer.loss_scaler = saved[keys.LOSS_SCALER]
    optimizer.dynamic_loss_scale = saved["dynamic_loss_scale"]
    optimizer.overflow = saved["overflow"]
    optimizer.skips = ours["skips"]
    for group, values in zip(optimizer.param_groups, ours["param_groups"], strict=True):
        group.update(values)


def _unpadded(unit: Unit, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()[: unit.saved_numel]


def _saved_state(unit: Unit, state: UnitState) -> dict[str, Any]:
    return {**state.scalars, **{k: _unpadded(unit, t) for k, t in state.moments.items()}}


def _initial_master(unit: Unit) -> torch.Tensor:
    """Master weights of a unit that was never stepped."""
    # A copy: a view of fp32 weights would be saved with the whole storage, which holds the shards of all ranks.
    return _unpadded(unit, unit.shard).to(torch.float32, copy=True)


def _initial_state(unit: Unit, store: StateStore) -> dict[str, Any]:
    """State of a unit that was never stepped."""
    template = store.template(unit)
    zeros = torch.zeros(()).expand(unit.saved_numel)
    return {**copy.deepcopy(dict(template.start or {})), **dict.fromkeys(template.moments, zeros)}


def _padded_state(unit: Unit, master: torch.Tensor, state: dict[str, Any]) -> UnitState:
    moments = {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == master.shape and v.dim() == 1}
    scalars = {k: v for k, v in state.items() if k not in moments}
    padding = unit.shard_numel - unit.saved_numel
    return UnitState(master, moments, scalars).map(
        lambda t: torch.nn.functional.pad(t.to(torch.float32), (0, padding))
    )


def _slices(unit: Unit) -> "OrderedDict[str, fragment_address]":
    """Parameter name -> its slice of this rank's shard, for the parameters that have one."""
    overlaps = ((name, unit.overlap(slot)) for slot, name in enumerate(unit.param_names))
    return OrderedDict((name, fragment_address(numel=n, start=start)) for name, (_, start, n) in overlaps if n)
