# SPDX-License-Identifier: Apache-2.0
"""Where the optimizer state of a unit lives between its steps.

State is made when a unit is stepped for the first time: the fp32 master shard is then copied from the low-precision weights, which
have not moved until then, so nothing is lost and a layer that was never drawn costs nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.runtime.units import Unit


@dataclass
class UnitState:
    """Optimizer state of this rank's shard of one unit.

    Attributes:
        master: fp32 weights, [shard_numel].
        moments: what the optimizer keeps per element (``exp_avg``, ``exp_avg_sq``), each [shard_numel].
        scalars: what it keeps per tensor (``step``): the unit's own step count, which is what bias correction needs.
    """

    master: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return self.master.nbytes + sum(t.nbytes for t in self.moments.values())

    def map(self, move: Any) -> "UnitState":
        """A state whose tensors are ``move(tensor)``; scalars are shared."""
        return UnitState(move(self.master), {k: move(t) for k, t in self.moments.items()}, self.scalars)


class StateStore:
    """Optimizer states of all units that were ever stepped, resting on the host or on the device.

    Args:
        on_device: True keeps states on the device (``offload.device: none``); False rests them in host memory and brings one
            unit's state to the device for the length of its step.
        pin_memory: page-lock the host copies.
    """

    def __init__(self, on_device: bool, pin_memory: bool):
        self.on_device = on_device
        self._pin = pin_memory and not on_device and get_accelerator().device_name() != "cpu"
        self._states: dict[Unit, UnitState] = {}
        self._window_bytes = 0
        self.peak_device_bytes = 0

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._states

    def __getitem__(self, unit: Unit) -> UnitState:
        """The resting state; synchronise the device before reading it on the host."""
        return self._states[unit]

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now."""
        return self._resting_bytes() if self.on_device else self._window_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory now."""
        return 0 if self.on_device else self._resting_bytes()

    @contextmanager
    def on_loan(self, unit: Unit, optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
        """Bring the unit's state to the device, hand it to ``optimizer`` under the yielded master, and take it back after.

        Copies run on the current stream: the step that follows is ordered behind the copy in, and the copy back behind the step.
        """
        resting = self._states.get(unit)
        state = self._create(unit) if resting is None else self._to_device(resting, unit)
        self._window_bytes = state.nbytes
        master = nn.Parameter(state.master)
        if state.moments or state.scalars:
            optimizer.state[master] = {**state.scalars, **state.moments}
        try:
            yield master
        finally:
            self._take_back(unit, state, resting, optimizer.state.pop(master, {}))

    def drop(self, unit: Unit) -> None:
        """Forget the unit's state; it is rebuilt from the weights at its next step."""
        self._states.pop(unit, None)

    def put(self, unit: Unit, state: UnitState) -> None:
        """Set the resting state of a unit (a checkpoint, or a user's own value)."""
        self._states[unit] = state.map(lambda t: t.to(unit.flat.device) if self.on_device else self._host_copy(t))

    def ensure(self, unit: Unit) -> UnitState:
        """The unit's resting state, made from its weights if it has none yet."""
        if unit not in self._states:
            self.put(unit, self._create(unit))
        return self._states[unit]

    def clear(self) -> None:
        self._states.clear()

    @staticmethod
    def _create(unit: Unit) -> UnitState:
        return UnitState(unit.shard.detach().to(torch.float32, copy=True))

    def _to_device(self, resting: UnitState, unit: Unit) -> UnitState:
        device = unit.flat.device
        return resting if self.on_device else resting.map(lambda t: t.to(device, non_blocking=True))

    def _take_back(self, unit: Unit, state: UnitState, resting: UnitState | None, left: dict[str, Any]) -> None:
        """Sort what the optimizer left behind into moments and scalars, and put it to rest."""
        shaped = {k: v for k, v in left.items() if torch.is_tensor(v) and v.shape == state.master.shape}
        fresh = UnitState(state.master, shaped, {k: v for k, v in left.items() if k not in shaped})
        self.peak_device_bytes = max(self.peak_device_bytes, fresh.nbytes if not self.on_device else 0)
        self._window_bytes = 0
        if self.on_device:
            self._states[unit] = fresh
            self.peak_device_bytes = max(self.peak_device_bytes, self._resting_bytes())
        elif resting is None or resting.moments.keys() != fresh.moments.keys():
            self._states[unit] = fresh.map(self._host_copy)
        else:
            self._copy_back(resting, fresh)

    @staticmethod
    def _copy_back(resting: UnitState, fresh: UnitState) -> None:
        """Into the same host buffers, so that pinned memory never grows."""
        pairs = [(resting.master, fresh.master), *((resting.moments[k], t) for k, t in fresh.moments.items())]
        for host, device in pairs:
            if host is not device and host.data_ptr() != device.data_ptr():
                host.copy_(device, non_blocking=True)
        resting.scalars = fresh.scalars

    def _host_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        host = tensor.detach().to("cpu")
        return get_accelerator().pin_memory(host) if self._pin else host

    def _resting_bytes(self) -> int:
        return sum(state.nbytes for state in self._states.values())
