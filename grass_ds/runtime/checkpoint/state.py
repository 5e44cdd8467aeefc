# SPDX-License-Identifier: Apache-2.0
"""State dict of the ZeRO wrapper: DeepSpeed's own schema of the stage, one flat group per unit, plus one key of ours.

DeepSpeed's tools (``zero_to_fp32.py``) read the stock keys; ``"grass"`` holds what they do not know: which units have state, and the
sampler. States of layers that were never stepped are not written: their fp32 weights are the low-precision ones.
"""

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from grass_ds.runtime.seams import checkpoint_keys as keys
from grass_ds.runtime.seams import fragment_address
from grass_ds.runtime.store import UnitState
from grass_ds.runtime.units import Unit

if TYPE_CHECKING:
    from grass_ds.runtime.zero import GrassZeroOptimizer

GRASS = "grass"
_REPLICATED_KEYS = (keys.BASE_OPTIMIZER_STATE, keys.SINGLE_PARTITION_OF_FP32_GROUPS)


def save(optimizer: "GrassZeroOptimizer") -> dict[str, Any]:
    """This rank's part of the optimizer, in host or device memory as it lies; shards without their padding."""
    get_accelerator().synchronize()
    optimizer.store.flush()
    units = optimizer.units
    states = {unit: optimizer.store[unit] for unit in units if unit in optimizer.store}
    hyper = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    base = {
        "state": {unit.index: _lean_state(unit, state) for unit, state in states.items()},
        "param_groups": [{**hyper[unit.group], "params": [unit.index]} for unit in units],
    }
    masters = [_lean(unit, states[unit].master if unit in states else unit.shard).to(torch.float32) for unit in units]
    stage = optimizer.settings.stage
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
            "layout": _layout(units),
            "param_groups": hyper,
            "skips": optimizer._skips,
        },
    }


def _replicated(base: dict[str, Any], masters: list[torch.Tensor], units: list[Unit]) -> dict[str, Any]:
    """What stages 1 and 2 call it."""
    return {
        keys.BASE_OPTIMIZER_STATE: base,
        keys.SINGLE_PARTITION_OF_FP32_GROUPS: masters,
        keys.GROUP_PADDINGS: [unit.shard_numel - unit.saved_numel for unit in units],
        keys.PARTITION_COUNT: [unit.world for unit in units],
        keys.PARAM_SLICE_MAPPINGS: [_slices(unit) for unit in units],
    }


def _partitioned(base: dict[str, Any], masters: list[torch.Tensor], units: list[Unit]) -> dict[str, Any]:
    """What stage 3 calls it."""
    return {
        keys.OPTIMIZER_STATE_DICT: base,
        keys.FP32_FLAT_GROUPS: masters,
        keys.PARTITION_COUNT: units[0].world,
    }


def load(
    optimizer: "GrassZeroOptimizer",
    state_dict_list: list[dict[str, Any]],
    load_optimizer_states: bool,
    load_from_fp32_weights: bool = True,
    checkpoint_folder: str | None = None,
    **_: Any,
) -> None:
    """Restore what :func:`save` wrote on a run with the same number of ranks. The active set follows at the end of the load.

    Raises:
        ValueError: a universal checkpoint, a checkpoint of plain DeepSpeed, or one of other layers, naming the difference.
    """
    if checkpoint_folder is not None:
        raise ValueError(
            "loading universal checkpoints is not supported yet; load a checkpoint saved with the same number of ranks"
        )
    saved = state_dict_list[dist.get_rank(group=optimizer.dp_process_group)]
    if GRASS not in saved:
        raise ValueError(
            "the checkpoint was not written by grass_ds, so its optimizer state has another layout; "
            "load the weights alone with load_checkpoint(..., load_optimizer_states=False)"
        )
    stage = optimizer.settings.stage
    ours = saved[GRASS]
    _check_layout(_layout(optimizer.units), ours["layout"])
    optimizer.loss_scaler = saved[keys.LOSS_SCALER]
    optimizer.dynamic_loss_scale = saved["dynamic_loss_scale"]
    optimizer.overflow = saved["overflow"]
    optimizer.controller.load_state_dict(ours["controller"])
    base, masters = (keys.OPTIMIZER_STATE_DICT, keys.FP32_FLAT_GROUPS) if stage == 3 else _REPLICATED_KEYS
    if stage == 3:  # the only place where the weights are saved
        for unit, master in zip(optimizer.units, saved[masters], strict=True):
            _lean(unit, unit.shard).copy_(master)
    if not load_optimizer_states:
        optimizer.store.clear()
        return
    optimizer._skips = ours["skips"]
    for group, values in zip(optimizer.param_groups, ours["param_groups"], strict=True):
        group.update(values)
    states = saved[base]["state"]
    for unit, master in zip(optimizer.units, saved[masters], strict=True):
        if unit.index in states:
            optimizer.store.put(unit, _padded_state(unit, master, states[unit.index]))
        else:
            optimizer.store.drop(unit)
    if not load_from_fp32_weights:
        optimizer.refresh_fp32_params()


def check_stage(folder: str | Path, tag: str | None, stage: int) -> None:
    """Raise ValueError for a checkpoint of ZeRO-3 on another stage or the reverse: DeepSpeed would look for files that are not there."""
    if tag is None:
        latest = Path(folder, "latest")
        if not latest.is_file():
            return  # DeepSpeed has a message for that
        tag = latest.read_text().strip()
    partitioned = any(Path(folder, str(tag)).glob("zero_pp_rank_*_model_states.pt"))
    replicated = any(Path(folder, str(tag)).glob("mp_rank_*_model_states.pt"))
    if partitioned != replicated and partitioned != (stage == 3):
        raise ValueError(
            f"the checkpoint {tag} was saved with ZeRO stage {'3' if partitioned else '1 or 2'} and this run has stage {stage}, which "
            "cuts weights into other shards; set zero_optimization.stage as it was, or start from its weights: zero_to_fp32.py in "
            "the checkpoint's folder writes them for any run"
        )


def _layout(units: list[Unit]) -> list[tuple[str, list[str], int, int]]:
    return [(unit.name, unit.param_names, unit.numel, unit.world) for unit in units]


def _check_layout(here: list[Any], saved: list[Any]) -> None:
    if [tuple(entry) for entry in saved] == here:
        return
    ours, theirs = {entry[0]: entry for entry in here}, {entry[0]: tuple(entry) for entry in saved}
    difference = [
        f"{name}: here {ours.get(name)}, saved {theirs.get(name)}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    raise ValueError(
        "the checkpoint has other layers, param groups or ranks than this run (name, parameters, elements, ranks): "
        + ("; ".join(difference[:3]) or "the same ones in another order")
        + (f"; and {len(difference) - 3} more" if len(difference) > 3 else "")
    )


def _lean(unit: Unit, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach()[: unit.saved_numel]


def _lean_state(unit: Unit, state: UnitState) -> dict[str, Any]:
    return {**state.scalars, **{k: _lean(unit, t) for k, t in state.moments.items()}}


def _padded_state(unit: Unit, master: torch.Tensor, state: dict[str, Any]) -> UnitState:
    moments = {k: v for k, v in state.items() if torch.is_tensor(v) and v.shape == master.shape and v.dim() == 1}
    scalars = {k: v for k, v in state.items() if k not in moments}
    padding = unit.shard_numel - unit.saved_numel
    return UnitState(master, moments, scalars).map(
        lambda t: torch.nn.functional.pad(t.to(torch.float32), (0, padding))
    )


def _slices(unit: Unit) -> "OrderedDict[str, fragment_address]":
    """Parameter name -> place in this rank's shard, for the parameters that have one."""
    places = ((name, unit.overlap(slot)) for slot, name in enumerate(unit.param_names))
    return OrderedDict((name, fragment_address(numel=n, start=start)) for name, (_, start, n) in places if n)
