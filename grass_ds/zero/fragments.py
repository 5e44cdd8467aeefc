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

from collections.abc import Callable, Sequence

import torch
from deepspeed import comm as dist
from torch import nn

from grass_ds.core.agreement import raise_on_all_ranks
from grass_ds.core.deepspeed_compat import fragment_address
from grass_ds.core.units import PartitionedUnit, Unit, whole_shape
from grass_ds.offload.state_template import MOMENT_KEYS
from grass_ds.offload.store import StateStore, UnitState
from grass_ds.zero.gradients import GradientReducer

Update = Callable[[torch.Tensor, nn.Parameter], torch.Tensor]

_ATTRIBUTES = ("get_full_hp_param", "set_full_hp_param", "get_full_hp_grad", "set_full_hp_grad", "_hp_mapping")


class ParamFragment:
    """One parameter's part of its unit's shards on this rank."""

    def __init__(self, unit: Unit, slot: int, store: StateStore, reducer: GradientReducer, group: object):
        self.unit, self.slot = unit, slot
        self._store, self._reducer, self._group = store, reducer, group
        self._shape = whole_shape(unit.params[slot])
        self._in_param, self._in_shard, self._numel = unit.overlap(slot)

    def attach(self, param: nn.Parameter) -> None:
        """Give ``param`` the methods that ``deepspeed.utils.safe_*`` look for."""
        param.get_full_hp_param = self.full_state  # type: ignore[attr-defined]
        param.set_full_hp_param = self.set_state  # type: ignore[attr-defined]
        param.get_full_hp_grad = self.full_gradient  # type: ignore[attr-defined]
        param.set_full_hp_grad = self.set_gradient  # type: ignore[attr-defined]
        param._hp_mapping = self  # type: ignore[attr-defined]

    @staticmethod
    def detach(param: nn.Parameter) -> None:
        """Undo :meth:`attach`."""
        for name in _ATTRIBUTES:
            if hasattr(param, name):
                delattr(param, name)

    def full_state(self, optim_state_key: str | None = None) -> torch.Tensor:
        """All ranks' fp32 weights, or optimizer state of that key: float32, the parameter's shape, on the device."""
        with raise_on_all_ranks(self._group, self.unit.device, self._store):
            shard = self.shard(optim_state_key)
        return self._gather(shard)

    def set_state(self, value: torch.Tensor, optim_state_key: str | None = None) -> None:
        """Set the fp32 weights or a moment. The next step or ``update_lp_params()`` passes weights to the model."""
        self.change(optim_state_key, lambda shard: self._write(shard, value))

    def full_gradient(self) -> torch.Tensor | None:
        """The averaged gradient, gathered: float32, the parameter's shape; None for a layer that is not active.

        Raises:
            ValueError: the layer is active, but this is not between backward and step.
        """
        shard = self.gradient_shard()
        return None if shard is None else self._gather(shard)

    def set_gradient(self, value: torch.Tensor) -> None:
        """Replace the averaged gradient of an active layer."""
        self._write(self.writable_gradient(), value)

    def get_hp_fragment_address(self) -> fragment_address:
        """This parameter's range in the rank's shard, in the form of DeepSpeed's checkpoints."""
        return fragment_address(numel=self._numel, start=self._in_shard)

    # ---- the unit's shards ------------------------------------------------------------------------------------------

    def change(self, optim_state_key: str | None, write: Callable[[torch.Tensor], None]) -> None:
        """Load a tensor of the unit's shard, change it by ``write``, and store it.

        Raises:
            ValueError: there is no optimizer state of that name.
        """
        if optim_state_key is not None and self.unit not in self._store:
            raise ValueError(f"{self.unit.name} has no optimizer state {optim_state_key!r}: it was never stepped")
        with raise_on_all_ranks(self._group, self.unit.device, self._store):
            state = self._store.ensure(self.unit)
            write(self._part(state, optim_state_key))
            self._store.put(self.unit, state)

    def writable_gradient(self) -> torch.Tensor:
        """The averaged gradient of the unit's shard, [shard_numel]; changes take effect.

        Raises:
            ValueError: the layer is not active, or see :meth:`gradient_shard`.
        """
        shard = self.gradient_shard()
        if shard is None:
            raise ValueError(f"{self.unit.name} is not active: it has no gradient to set")
        return shard

    def gradient_shard(self) -> torch.Tensor | None:
        """The averaged gradient of the unit's shard, [shard_numel]; None for a layer that is not active.

        Raises:
            ValueError: the layer is active, but this is not between backward and step.
        """
        if not self.unit.active:
            return None
        if self.unit not in self._reducer.shards:
            raise ValueError("gradients are only available after backward and before step, and not while probing")
        return self._reducer.shards[self.unit]

    def shard(self, key: str | None) -> torch.Tensor:
        """The unit's fp32 weights, or the optimizer state named by ``key``, [shard_numel]. Read only."""
        if self.unit not in self._store:
            if key is None:
                return self.unit.shard
            if key not in MOMENT_KEYS:
                raise ValueError(f"{self.unit.name} was never stepped and has no optimizer state {key!r}")
            return torch.zeros(1, device=self.unit.device).expand(self.unit.shard_numel)
        return self._part(self._store[self.unit], key)

    def _part(self, state: UnitState, key: str | None) -> torch.Tensor:
        """The master weights, or the moment of that name."""
        if key is not None and key not in state.moments:
            raise ValueError(f"{self.unit.name} has no optimizer state {key!r}; it has {sorted(state.moments)}")
        return state.master if key is None else state.moments[key]

    def _gather(self, shard: torch.Tensor) -> torch.Tensor:
        full = torch.zeros(self._shape.numel(), dtype=torch.float32, device=self.unit.device)
        part = shard.detach().narrow(0, self._in_shard, self._numel)
        full.narrow(0, self._in_param, self._numel).copy_(part)
        dist.all_reduce(full, group=self._group)
        return full.view(self._shape)

    def _write(self, shard: torch.Tensor, value: torch.Tensor) -> None:
        part = value.detach().reshape(-1).narrow(0, self._in_param, self._numel)
        shard.detach().narrow(0, self._in_shard, self._numel).copy_(part)


class PartitionedAccess:
    """The methods of ``param._z3_optimizer``. They return None for parameters that the user froze, as in DeepSpeed."""

    def __init__(self) -> None:
        self._fragments: dict[nn.Parameter, ParamFragment] = {}

    def add(self, param: nn.Parameter, fragment: ParamFragment) -> None:
        self._fragments[param] = fragment

    # ---- full tensors -----------------------------------------------------------------------------------------------

    def get_full_hp_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        found = self._fragments.get(param)
        return None if found is None else found.full_state(optim_state_key)

    def set_full_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        if param in self._fragments:
            self._fragments[param].set_state(value, optim_state_key)

    def get_fp32_grad_for_param(self, param: nn.Parameter) -> torch.Tensor | None:
        found = self._fragments.get(param)
        return None if found is None else found.full_gradient()

    def set_fp32_grad_for_param(self, value: torch.Tensor, param: nn.Parameter) -> None:
        if param in self._fragments:
            self._fragments[param].set_gradient(value)

    def update_fp32_grad_for_param_vectorized(self, update_func: Update, param_list: Sequence[nn.Parameter]) -> None:
        for param in param_list:
            gradient = self.get_fp32_grad_for_param(param)
            if gradient is not None:
                self.set_fp32_grad_for_param(update_func(gradient, param), param)

    # ---- this rank's partition --------------------------------------------------------------------------------------

    def get_local_fp32_param(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.Tensor | None:
        found = self._fragments.get(param)
        return None if found is None else _copy_of_partition(found, found.shard(optim_state_key))

    def set_local_hp_param(self, value: torch.Tensor, param: nn.Parameter, optim_state_key: str | None = None) -> None:
        found = self._fragments.get(param)
        if found is not None:
            found.change(optim_state_key, lambda shard: _write_partition(found, shard, value))

    def get_local_fp32_grad_for_param(self, param: nn.Parameter) -> torch.Tensor | None:
        found = self._fragments.get(param)
        shard = None if found is None else found.gradient_shard()
        return None if found is None or shard is None else _copy_of_partition(found, shard)

    def set_local_grad_for_param(self, value: torch.Tensor, param: nn.Parameter) -> None:
        found = self._fragments.get(param)
        if found is not None:
            _write_partition(found, found.writable_gradient(), value)

    def get_hp_param_device(self, param: nn.Parameter, optim_state_key: str | None = None) -> torch.device | None:
        found = self._fragments.get(param)
        return None if found is None else found.shard(optim_state_key).device


def _view_of_partition(fragment: ParamFragment, shard: torch.Tensor) -> torch.Tensor:
    """The parameter's partition within a tensor of its unit's shard, padding included: [part]."""
    unit, slot = fragment.unit, fragment.slot
    assert isinstance(unit, PartitionedUnit)
    return shard.detach().narrow(0, unit.offsets[slot], unit.parts[slot])


def _copy_of_partition(fragment: ParamFragment, shard: torch.Tensor) -> torch.Tensor:
    """float32, [part], on the model's device."""
    return _view_of_partition(fragment, shard).to(fragment.unit.device, torch.float32, copy=True)


def _write_partition(fragment: ParamFragment, shard: torch.Tensor, value: torch.Tensor) -> None:
    part = _view_of_partition(fragment, shard)
    if value.numel() != part.numel():
        raise ValueError(f"{fragment.unit.name}: the partition has {part.numel()} elements, the value {value.numel()}")
    part.copy_(value.detach().reshape(-1))
