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

_METHODS = ("get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad")


class ParamFragment:
    """One parameter's part of its unit's shards on this rank."""

    def __init__(self, unit: Unit, slot: int, store: StateStore, reducer: GradientReducer, group: object):
        self.unit, self.slot = unit, slot
        self._store, self._reducer, self._group = store, reducer, group
        self._shape = whole_shape(unit.params[slot])
        self._in_param, self._in_shard, self._numel = unit.overlap(slot)

    def attach(self, param: nn.Parameter) -> None:
        """Give ``param`` the methods that ``deepspeed.utils.safe_*`` look for."""
        vars(param).update({name: getattr(self, name) for name in _METHODS}, _hp_mapping=self)

    @staticmethod
    def detach(param: nn.Parameter) -> None:
        """Undo :meth:`attach`."""
        for name in (*_METHODS, "_hp_mapping"):
            vars(param).pop(name, None)

    # ---- full tensors -----------------------------------------------------------------------------------------------

    def get_full_hp_param(self, optim_state_key: str | None = None) -> torch.Tensor:
        """All ranks' fp32 weights, or optimizer state of that key: float32, the parameter's shape, on the device."""
        with raise_on_all_ranks(self._group, self.unit.device, self._store):
            shard = self._state(optim_state_key)
        return self._gather(shard)

    def set_full_hp_param(self, value: torch.Tensor, optim_state_key: str | None = None) -> None:
        """Set the fp32 weights or a moment. The next step or ``update_lp_params()`` passes weights to the model."""
        self._change(optim_state_key, lambda shard: self._write(shard, value))

    def get_full_hp_grad(self) -> torch.Tensor | None:
        """The averaged gradient: float32, the parameter's shape; None for a layer that is not active."""
        shard = self._gradient()
        return None if shard is None else self._gather(shard)

    def set_full_hp_grad(self, value: torch.Tensor) -> None:
        """Replace the averaged gradient of an active layer."""
        self._write(self._active_gradient(), value)

    # ---- the same for this rank's partition (ZeRO-3), padding included: [part] --------------------------------------

    def get_local_param(self, optim_state_key: str | None = None) -> torch.Tensor:
        return self._copy_of_partition(self._state(optim_state_key))

    def set_local_param(self, value: torch.Tensor, optim_state_key: str | None = None) -> None:
        self._change(optim_state_key, lambda shard: self._write_partition(shard, value))

    def get_local_grad(self) -> torch.Tensor | None:
        shard = self._gradient()
        return None if shard is None else self._copy_of_partition(shard)

    def set_local_grad(self, value: torch.Tensor) -> None:
        self._write_partition(self._active_gradient(), value)

    # ---- the unit's shards, [shard_numel] ---------------------------------------------------------------------------

    def _state(self, key: str | None) -> torch.Tensor:
        """The fp32 weights, or the optimizer state named by ``key``. Read only."""
        if self.unit in self._store:
            return self._part(self._store[self.unit], key)
        if key is None:
            return self.unit.shard
        if key not in MOMENT_KEYS:
            raise ValueError(f"{self.unit.name} was never stepped and has no optimizer state {key!r}")
        return torch.zeros(1, device=self.unit.device).expand(self.unit.shard_numel)

    def _change(self, key: str | None, write: Callable[[torch.Tensor], None]) -> None:
        """Load the weights or a moment, change them by ``write``, and store them."""
        if key is not None and self.unit not in self._store:
            raise ValueError(f"{self.unit.name} has no optimizer state {key!r}: it was never stepped")
        with raise_on_all_ranks(self._group, self.unit.device, self._store):
            state = self._store.ensure(self.unit)
            write(self._part(state, key))
            self._store.put(self.unit, state)

    def _part(self, state: UnitState, key: str | None) -> torch.Tensor:
        if key is not None and key not in state.moments:
            raise ValueError(f"{self.unit.name} has no optimizer state {key!r}; it has {sorted(state.moments)}")
        return state.master if key is None else state.moments[key]

    def _gradient(self) -> torch.Tensor | None:
        """The averaged gradient; None for a layer that is not active. ValueError if not between backward and step."""
        if not self.unit.active:
            return None
        if self.unit not in self._reducer.shards:
            raise ValueError("gradients are only available after backward and before step, and not while probing")
        return self._reducer.shards[self.unit]

    def _active_gradient(self) -> torch.Tensor:
        shard = self._gradient()
        if shard is None:
            raise ValueError(f"{self.unit.name} is not active: it has no gradient to set")
        return shard

    # ---- the parameter within a shard -------------------------------------------------------------------------------

    def _gather(self, shard: torch.Tensor) -> torch.Tensor:
        full = torch.zeros(self._shape.numel(), dtype=torch.float32, device=self.unit.device)
        part = shard.detach().narrow(0, self._in_shard, self._numel)
        full.narrow(0, self._in_param, self._numel).copy_(part)
        dist.all_reduce(full, group=self._group)
        return full.view(self._shape)

    def _write(self, shard: torch.Tensor, value: torch.Tensor) -> None:
        part = value.detach().reshape(-1).narrow(0, self._in_param, self._numel)
        shard.detach().narrow(0, self._in_shard, self._numel).copy_(part)

    def _part_of_rank(self, shard: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.unit, PartitionedUnit)
        return shard.detach().narrow(0, self.unit.offsets[self.slot], self.unit.parts[self.slot])

    def _copy_of_partition(self, shard: torch.Tensor) -> torch.Tensor:
        return self._part_of_rank(shard).to(self.unit.device, torch.float32, copy=True)

    def _write_partition(self, shard: torch.Tensor, value: torch.Tensor) -> None:
        part = self._part_of_rank(shard)
        if value.numel() != part.numel():
            raise ValueError(f"{self.unit.name}: the partition has {part.numel()} elements, the value {value.numel()}")
        part.copy_(value.detach().reshape(-1))


class PartitionedAccess:
    """The methods of ``param._z3_optimizer``. They return None for parameters that the user froze, as in DeepSpeed."""

    def __init__(self, fragments: Mapping[nn.Parameter, ParamFragment]):
        self._fragments = fragments

    def _get(self, method: Callable[..., Any], param: nn.Parameter, *optim_state_key: str) -> Any:
        return method(self._fragments[param], *optim_state_key) if param in self._fragments else None

    def _set(self, method: Callable[..., Any], value: Any, param: nn.Parameter, *optim_state_key: str) -> None:
        if param in self._fragments:
            method(self._fragments[param], value, *optim_state_key)

    get_full_hp_param = partialmethod(_get, ParamFragment.get_full_hp_param)
    set_full_hp_param = partialmethod(_set, ParamFragment.set_full_hp_param)
    get_fp32_grad_for_param = partialmethod(_get, ParamFragment.get_full_hp_grad)
    set_fp32_grad_for_param = partialmethod(_set, ParamFragment.set_full_hp_grad)
    get_local_fp32_param = partialmethod(_get, ParamFragment.get_local_param)
    set_local_hp_param = partialmethod(_set, ParamFragment.set_local_param)
    get_local_fp32_grad_for_param = partialmethod(_get, ParamFragment.get_local_grad)
    set_local_grad_for_param = partialmethod(_set, ParamFragment.set_local_grad)

    def update_fp32_grad_for_param_vectorized(self, update_func: Update, param_list: Sequence[nn.Parameter]) -> None:
        for param in param_list:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update_func(gradient, param), param)
