# SPDX-License-Identifier: Apache-2.0
"""``deepspeed.utils.safe_get_*`` / ``safe_set_*`` for parameters whose state is sharded by unit.

In stages 1 and 2 DeepSpeed's functions call methods that the ZeRO optimizer sets on every parameter
(:class:`ParamFragment`). In stage 3 they call methods of ``param._z3_optimizer`` (:class:`PartitionedAccess`).

Functions for full tensors are collective: every data-parallel rank must call them. Functions for this rank's partition
(``safe_get_local_*``) are collective only with state in files, which can fail on one rank alone.

Results for an inactive layer: the fp32 weights always (before the layer's first step, its low-precision weights in
fp32); the optimizer state of its last active period, or zeros; None for the gradient. While probing no gradient is
available.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partialmethod
from typing import Any

import torch
from deepspeed import comm as dist
from torch import nn

from grass_ds.core.agreement import raise_on_all_ranks
from grass_ds.core.units import PartitionedUnit, Unit, whole_shape
from grass_ds.offload.state_template import MOMENT_KEYS
from grass_ds.offload.store import StateStore, UnitState
from grass_ds.zero.gradients import GradientReducer

Update = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]

# DeepSpeed's names of the methods of a parameter, and ours
_METHODS = {
    "get_full_hp_param": "read_state",
    "set_full_hp_param": "write_state",
    "get_full_hp_grad": "read_gradient",
    "set_full_hp_grad": "write_gradient",
}


class ParamFragment:
    """One parameter's part of its unit's shards on this rank.

    Args:
        partition: read and write this rank's partition (ZeRO-3, [part], padding included), not the full parameter.
    """

    def __init__(
        self,
        unit: Unit,
        slot: int,
        store: StateStore,
        reducer: GradientReducer,
        group: object,
        partition: bool = False,
    ):
        self.unit = unit
        self._store, self._reducer, self._group = store, reducer, group
        self._full = not partition
        self._shape = whole_shape(unit.params[slot])
        self._in_param, self._in_shard, self._numel = unit.overlap(slot)
        if partition:
            assert isinstance(unit, PartitionedUnit)
            self._in_param, self._in_shard, self._numel = 0, unit.offsets[slot], unit.parts[slot]
            self._shape = torch.Size([self._numel])

    def attach(self, param: nn.Parameter) -> None:
        """Give ``param`` the methods that ``deepspeed.utils.safe_*`` look for."""
        vars(param).update({name: getattr(self, ours) for name, ours in _METHODS.items()}, _hp_mapping=self)

    @staticmethod
    def detach(param: nn.Parameter) -> None:
        """Undo :meth:`attach`."""
        for name in (*_METHODS, "_hp_mapping"):
            vars(param).pop(name, None)

    def read_state(self, optim_state_key: str | None = None) -> torch.Tensor:
        """The fp32 weights, or optimizer state of that key: a copy, float32, on the device."""
        with raise_on_all_ranks(self._group, self.unit.device, self._store) if self._full else nullcontext():
            shard = self._state(optim_state_key)
        return self._read(shard)

    def write_state(self, value: torch.Tensor, optim_state_key: str | None = None) -> None:
        """Set the fp32 weights or a moment. The next step or ``update_lp_params()`` passes weights to the model."""
        if optim_state_key is not None and self.unit not in self._store:
            raise ValueError(f"{self.unit.name} has no optimizer state {optim_state_key!r}: it was never stepped")
        with raise_on_all_ranks(self._group, self.unit.device, self._store):
            state = self._store.ensure(self.unit)
            self._write(self._member(state, optim_state_key), value)
            self._store.put(self.unit, state)

    def read_gradient(self) -> torch.Tensor | None:
        """The averaged gradient: a copy, float32; None for a layer that is not active."""
        return self._read(self._gradient()) if self.unit.active else None

    def write_gradient(self, value: torch.Tensor) -> None:
        """Replace the averaged gradient of an active layer."""
        if not self.unit.active:
            raise ValueError(f"{self.unit.name} is not active: it has no gradient to set")
        self._write(self._gradient(), value)

    def _state(self, key: str | None) -> torch.Tensor:
        """The unit's fp32 weights, or its optimizer state of that key, [shard_numel]. Read only."""
        if self.unit in self._store:
            return self._member(self._store[self.unit], key)
        if key is None:
            return self.unit.shard
        if key not in MOMENT_KEYS:
            raise ValueError(f"{self.unit.name} was never stepped and has no optimizer state {key!r}")
        return torch.zeros(1, device=self.unit.device).expand(self.unit.shard_numel)

    def _member(self, state: UnitState, key: str | None) -> torch.Tensor:
        if key is not None and key not in state.moments:
            raise ValueError(f"{self.unit.name} has no optimizer state {key!r}; it has {sorted(state.moments)}")
        return state.master if key is None else state.moments[key]

    def _gradient(self) -> torch.Tensor:
        if self.unit not in self._reducer.shards:
            raise ValueError("gradients are only available after backward and before step, and not while probing")
        return self._reducer.shards[self.unit]

    def _read(self, shard: torch.Tensor) -> torch.Tensor:
        values = torch.zeros(self._shape.numel(), dtype=torch.float32, device=self.unit.device)
        part = shard.detach().narrow(0, self._in_shard, self._numel)
        values.narrow(0, self._in_param, self._numel).copy_(part)
        if self._full:
            dist.all_reduce(values, group=self._group)
        return values.view(self._shape)

    def _write(self, shard: torch.Tensor, value: torch.Tensor) -> None:
        if value.numel() != self._shape.numel():
            what = "parameter" if self._full else "partition"
            raise ValueError(
                f"{self.unit.name}: the {what} has {self._shape.numel()} elements, the value {value.numel()}"
            )
        part = value.detach().reshape(-1).narrow(0, self._in_param, self._numel)
        shard.detach().narrow(0, self._in_shard, self._numel).copy_(part)


class PartitionedAccess:
    """The methods of ``param._z3_optimizer``. They return None for parameters that the user froze, as in DeepSpeed."""

    def __init__(self, full: Mapping[nn.Parameter, ParamFragment], local: Mapping[nn.Parameter, ParamFragment]):
        self._fragments = {"full": full, "local": local}

    def _get(self, extent: str, method: Callable[..., Any], param: nn.Parameter, *optim_state_key: str) -> Any:
        fragment = self._fragments[extent].get(param)
        return None if fragment is None else method(fragment, *optim_state_key)

    def _set(self, extent: str, method: Callable[..., Any], value: Any, param: nn.Parameter, *key: str) -> None:
        if fragment := self._fragments[extent].get(param):
            method(fragment, value, *key)

    get_full_hp_param = partialmethod(_get, "full", ParamFragment.read_state)
    set_full_hp_param = partialmethod(_set, "full", ParamFragment.write_state)
    get_fp32_grad_for_param = partialmethod(_get, "full", ParamFragment.read_gradient)
    set_fp32_grad_for_param = partialmethod(_set, "full", ParamFragment.write_gradient)
    get_local_fp32_param = partialmethod(_get, "local", ParamFragment.read_state)
    set_local_hp_param = partialmethod(_set, "local", ParamFragment.write_state)
    get_local_fp32_grad_for_param = partialmethod(_get, "local", ParamFragment.read_gradient)
    set_local_grad_for_param = partialmethod(_set, "local", ParamFragment.write_gradient)

    def update_fp32_grad_for_param_vectorized(self, update_func: Update, param_list: Sequence[nn.Parameter]) -> None:
        for param in param_list:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update_func(gradient, param), param)
