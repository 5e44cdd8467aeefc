# SPDX-License-Identifier: Apache-2.0
"""The optimizer states of all units, on the device, in host memory or on disk.

State is made when a unit is stepped for the first time: its fp32 master weights are copied from the low-precision
ones, which have not changed until then. So a layer that was never drawn costs nothing.

[Note: Errors] A transfer can fail on one rank alone. Its peers can only hear of it in calls that every rank makes:
``step`` and some others (``agreement.raise_on_all_ranks``). All other calls raise no ``OffloadError``: the tier keeps
its ``error``, and the next step raises it on every rank.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grass_ds.core.rounding import follow
from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk, StateLayout
from grass_ds.offload.device_buffers import DeviceBuffers
from grass_ds.offload.state_files import OffloadError
from grass_ds.offload.state_template import StateTemplate
from grass_ds.offload.tier import Tier
from grass_ds.offload.trace import Trace


@dataclass
class UnitState:
    """Optimizer state of this rank's shard of one unit; tensors are fp32 [shard_numel]."""

    master: torch.Tensor
    moments: dict[str, torch.Tensor] = field(default_factory=dict)
    """What the optimizer keeps per element: ``exp_avg``, ``exp_avg_sq``."""
    scalars: dict[str, Any] = field(default_factory=dict)
    """What it keeps per tensor: ``step``, the unit's own step count, which bias correction needs."""

    def map(self, move: Any) -> "UnitState":
        """A state whose tensors are ``move(tensor)``; scalars are shared."""
        return UnitState(move(self.master), {k: move(t) for k, t in self.moments.items()}, self.scalars)


class StateStore:
    """Optimizer states of all units that were ever stepped: device buffers over a tier on the host or on disk."""

    def __init__(
        self, tier: Tier, buffers: DeviceBuffers, templates: Sequence[StateTemplate], layout: StateLayout, trace: Trace
    ):
        self.trace = trace
        self.chunk_numel = layout.chunk_numel
        self._tier, self._buffers, self._templates, self._layout = tier, buffers, templates, layout
        self._scalars: dict[Unit, dict[str, Any]] = {}
        self._moved: set[Unit] = set()  # their weights have moved without the master weights
        self._assigned: set[Unit] = set()  # their master weights may have been set without the weights
        buffers.stored = self._scalars.keys()

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._scalars

    def __getitem__(self, unit: Unit) -> UnitState:
        """The unit's state, read-only: :meth:`put` changes it. On the host, or on the device with ``device: none``."""
        planes = self._buffers.read(unit)
        moments = dict(zip(self.template(unit).moments, planes[1:], strict=True))
        master = follow(planes[0], unit.shard.to(planes[0].device)) if unit in self._moved else planes[0]
        return UnitState(master, moments, self._scalars[unit])

    def template(self, unit: Unit) -> StateTemplate:
        return self._templates[unit.group]

    def chunks(self, unit: Unit) -> list[Chunk]:
        return self._layout.chunks(unit)

    @property
    def device_bytes(self) -> int:
        return self._buffers.nbytes

    @property
    def peak_device_bytes(self) -> int:
        return self._buffers.peak_bytes

    @property
    def host_bytes(self) -> int:
        return self._tier.host_bytes

    @property
    def nvme_bytes(self) -> int:
        return self._tier.nvme_bytes

    @property
    def fallible(self) -> bool:
        """Whether states pass through files, which can fail on one rank alone."""
        return self.nvme_bytes > 0

    @property
    def error(self) -> BaseException | None:
        return self._tier.error

    # ---- before a step ----------------------------------------------------------------------------------------------

    def plan(self, units: Sequence[Unit]) -> None:
        """The coming steps step ``units``, in this order."""
        with suppress(OffloadError):
            self._buffers.plan([chunk for unit in units for chunk in self.chunks(unit)])

    def prefetch(self, unit: Unit) -> None:
        """The unit's gradient is reduced, so it will be stepped soon."""
        with suppress(OffloadError):
            self._buffers.prefetch(self.chunks(unit))

    def prepare(self, units: Sequence[Unit]) -> None:
        """These units will probably be planned next."""
        with suppress(OffloadError):
            self._buffers.prepare([chunk for unit in units for chunk in self.chunks(unit)])

    # ---- in a step --------------------------------------------------------------------------------------------------

    @contextmanager
    def on_device(self, chunk: Chunk, optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
        """Hold the chunk's state on the device, as ``optimizer``'s state of the yielded master [chunk.numel].

        All chunks of a unit must be stepped in order: the scalars they share (the step count) advance with the last.

        Raises:
            OffloadError: a transfer failed, now or since the last step.
        """
        if self.error is not None:
            raise self.error
        unit, template = chunk.unit, self.template(chunk.unit)
        planes = self._buffers.acquire(chunk)
        if unit not in self:
            planes[0].copy_(chunk.of(unit.shard))
            for plane in planes[1:]:
                plane.zero_()
        elif unit in self._moved:
            planes[0].copy_(follow(planes[0], chunk.of(unit.shard).to(planes[0].device)))
        master, moments = nn.Parameter(planes[0]), dict(zip(template.moments, planes[1:], strict=True))
        scalars: Any = self._scalars.get(unit, template.start)
        if scalars is not None and (scalars or moments):
            optimizer.state[master] = {**copy.deepcopy(dict(scalars)), **moments}
        try:
            yield master
            scalars = _take_state(unit, optimizer.state.get(master, {}), moments)
            self._buffers.release(chunk)
            if chunk.last:
                self._scalars[unit] = scalars
                self._moved.discard(unit)
                self._assigned.discard(unit)
        except BaseException:
            if not self._buffers.keeps_all:  # half stepped, but the tier has the state before
                self._buffers.discard(unit)
            raise
        finally:
            optimizer.state.pop(master, None)

    def end_step(self) -> None:
        with suppress(OffloadError):
            self._buffers.end_step()

    # ---- between steps ----------------------------------------------------------------------------------------------

    def put(self, unit: Unit, state: UnitState) -> None:
        """Set the state of a unit. Moments that it lacks start at zero.

        Raises:
            ValueError: a moment that the optimizer does not keep, or none where it cannot start at zero.
        """
        template = self.template(unit)
        unknown = state.moments.keys() - set(template.moments)
        if unknown:
            raise ValueError(f"{unit.name}: the optimizer keeps no {sorted(unknown)}, only {list(template.moments)}")
        complete = len(state.moments) == len(template.moments)
        scalars = state.scalars if complete or state.scalars else template.start
        if scalars is None or (template.start is None and not complete):
            raise ValueError(f"{unit.name}: state of this optimizer cannot be set before the first step of the layer")
        zeros = torch.zeros((), device=state.master.device).expand(unit.shard_numel)
        planes = [state.master, *(state.moments.get(name, zeros) for name in template.moments)]
        self._buffers.write(unit, planes)
        self._scalars[unit] = copy.deepcopy(dict(scalars))
        self._moved.discard(unit)
        self._assigned.add(unit)

    @contextmanager
    def moving(self, unit: Unit) -> Iterator[None]:
        """Inside, the caller moves the low-precision weights. Master weights, if any, follow when they are used next.

        Master weights that were set since the last step, as by ``safe_set_full_fp32_param``, become the weights first.
        """
        if unit in self._assigned:
            unit.shard.copy_(self[unit].master)
        yield
        self._assigned.discard(unit)
        if unit in self:
            self._moved.add(unit)

    def ensure(self, unit: Unit) -> UnitState:
        """The unit's state, made from its weights if it has none yet."""
        if unit not in self:
            self.put(unit, UnitState(unit.shard.detach().to(torch.float32)))
        return self[unit]

    def drop(self, unit: Unit) -> None:
        """Delete the unit's state, if any; the next step makes it from the weights again."""
        if self._scalars.pop(unit, None) is None:
            return
        self._moved.discard(unit)
        self._assigned.discard(unit)
        with suppress(OffloadError):
            self._buffers.discard(unit)
        self._tier.drop(unit)

    def clear(self) -> None:
        for unit in list(self._scalars):
            self.drop(unit)

    def flush(self) -> None:
        """Write all states back to the tier and wait; raise what failed."""
        self._buffers.flush()
        self._tier.flush()

    def close(self) -> None:
        """Release device memory, host memory, threads and files; write the trace. Idempotent."""
        for units in (self._scalars, self._moved, self._assigned):
            units.clear()
        try:
            self._buffers.close()
        finally:
            self._tier.close()
            self.trace.write()


def _take_state(unit: Unit, state: dict[str, Any], moments: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Copy moments that a step replaced into the buffers; returns the scalars."""
    for name, plane in moments.items():
        if state[name] is not plane:  # the optimizer made its own, as at a first step
            plane.copy_(state[name])
    scalars = {name: value for name, value in state.items() if name not in moments}
    grown = [name for name, value in scalars.items() if torch.is_tensor(value) and value.numel() > 1]
    if grown:
        raise RuntimeError(f"{unit.name}: the optimizer began to keep {grown}, which it did not at the start")
    return scalars
