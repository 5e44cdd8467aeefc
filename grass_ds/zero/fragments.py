# SPDX-License-Identifier: Apache-2.0
"""``deepspeed.utils.safe_get_*`` / ``safe_set_*`` for parameters whose state is sharded by unit.

DeepSpeed's functions call methods that the ZeRO wrapper puts on every parameter (stages 1 and 2), or those of one object that every
parameter refers to (stage 3, :mod:`~grass_ds.zero.partitioned`); these are ours. All of them are collective: every data-parallel rank must
call them.

What they answer for a layer that is not active: the fp32 weights always (those of a layer never stepped are its low-precision
weights, widened); the optimizer state kept from its active periods, zeros if there were none; None for the gradient, since there is
none. While probing there are no gradients to get either.
"""

from collections.abc import Callable

import torch
from deepspeed import comm as dist
from torch import nn

from grass_ds.core.agreement import raise_on_all_ranks
from grass_ds.core.deepspeed_compat import fragment_address
from grass_ds.core.units import Unit, whole_shape
from grass_ds.offload.state_template import MOMENT_KEYS
from grass_ds.offload.store import StateStore, UnitState
from grass_ds.zero.gradients import GradientReducer

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
        """fp32 weights, or the optimizer state named by the key, gathered: float32, the parameter's shape, on the device."""
        with raise_on_all_ranks(self._group, self.unit.device, self._store):
            shard = self.shard(optim_state_key)
        return self._gather(shard)

    def set_state(self, value: torch.Tensor, optim_state_key: str | None = None) -> None:
        """Set the fp32 weights or a moment. Weights reach the model at the layer's next step, or by ``update_lp_params()``."""
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
        """Place of this parameter in the rank's shard, as DeepSpeed's checkpoints record it."""
        return fragment_address(numel=self._numel, start=self._in_shard)

    # ---- the unit's shards ----------------------------------------------------------------------------------------------

    def change(self, optim_state_key: str | None, write: Callable[[torch.Tensor], None]) -> None:
        """Let ``write`` change a tensor of the unit's shard, and keep the result."""
        if optim_state_key is not None and self.unit not in self._store:
            raise ValueError(f"{self.unit.name} has no optimizer state {optim_state_key!r}: it was never stepped")
        with raise_on_all_ranks(self._group, self.unit.device, self._store):
            state = self._store.ensure(self.unit)
            write(self._part(state, optim_state_key))
            self._store.put(self.unit, state)

    def writable_gradient(self) -> torch.Tensor:
        """The averaged gradient of the unit's shard, to be changed in place."""
        shard = self.gradient_shard()
        if shard is None:
            raise ValueError(f"{self.unit.name} is not active: it has no gradient to set")
        return shard

    def gradient_shard(self) -> torch.Tensor | None:
        """The averaged gradient of the unit's shard, [shard_numel]; None for a layer that is not active."""
        if not self.unit.active:
            return None
        if self.unit not in self._reducer.shards:
            raise ValueError("gradients are only available after backward and before step, and not while probing")
        return self._reducer.shards[self.unit]

    def shard(self, key: str | None) -> torch.Tensor:
        """The unit's fp32 weights, or the optimizer state named by ``key``, [shard_numel], to be read only."""
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
