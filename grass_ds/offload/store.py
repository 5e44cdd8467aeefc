# SPDX-License-Identifier: Apache-2.0
"""The optimizer states of all units, on the device, in host memory or on disk.

State is made when a unit is stepped for the first time: its fp32 master weights are copied from the low-precision
ones, which have not changed until then. So a layer that was never drawn costs nothing.

[Note: Formats] Device buffers, tiers and checkpoints hold states as :class:`StateFormat` encodes them. A step decodes
a chunk into memory of the store, and encodes it again. A format that needs the low-precision weights cannot hold
master weights that were set without them (``safe_set_full_fp32_param``). Those are kept apart until they are the
weights, too.

[Note: Errors] A transfer can fail on one rank alone. Its peers can only hear of it in calls that every rank makes:
``step`` and some others (``agreement.raise_on_all_ranks``). All other calls raise no ``OffloadError``: the tier keeps
its ``error``, and the next step raises it on every rank.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grass_ds.core.agreement import digest
from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk, StateLayout
from grass_ds.offload.device_buffers import DeviceBuffers
from grass_ds.offload.state_files import OffloadError
from grass_ds.offload.state_format import StateFormat, choose_format
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
        self,
        tier: Tier,
        buffers: DeviceBuffers,
        templates: Sequence[StateTemplate],
        formats: Mapping[tuple[int, torch.dtype], StateFormat],
        layout: StateLayout,
        device: torch.device,
        trace: Trace,
    ):
        self.trace = trace
        self.chunk_numel = layout.chunk_numel
        self._tier, self._buffers, self._layout, self._device = tier, buffers, layout, device
        self._templates, self._formats = templates, formats  # of a param group; of a param group and a dtype
        self._decoded: list[torch.Tensor] = []  # a chunk's state in fp32 during its step
        self._masters: dict[Unit, torch.Tensor] = {}  # fp32 master weights that were set without the weights
        self._scalars: dict[Unit, dict[str, Any]] = {}
        self._moved: set[Unit] = set()  # their weights have moved without the master weights
        self._assigned: set[Unit] = set()  # their master weights may have been set without the weights
        buffers.stored = self._scalars.keys()

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._scalars

    def __getitem__(self, unit: Unit) -> UnitState:
        """The unit's state, read-only: :meth:`put` changes it. On the host, or on the device with ``device: none``."""
        planes = stored = self._buffers.read(unit)
        form, device, moved = self.format(unit), stored[0].device, unit in self._moved
        if moved or not form.plain:
            planes = [torch.empty(unit.shard_numel, device=device) for _ in range(1 + len(form.moments))]
            form.decode(stored, unit.shard.to(device), moved, planes)
        master = self._masters.get(unit, planes[0])
        return UnitState(master, dict(zip(self.template(unit).moments, planes[1:], strict=True)), self._scalars[unit])

    def template(self, unit: Unit) -> StateTemplate:
        return self._templates[unit.group]

    def scalars(self, unit: Unit) -> dict[str, Any]:
        """What the optimizer keeps per tensor of a unit that has state."""
        return self._scalars[unit]

    def format(self, unit: Unit) -> StateFormat:
        return self._formats[unit.group, unit.dtype]

    def chunks(self, unit: Unit) -> list[Chunk]:
        return self._layout.chunks(unit)

    @property
    def device_bytes(self) -> int:
        return self._buffers.nbytes + self._decoded_bytes

    @property
    def peak_device_bytes(self) -> int:
        return self._buffers.peak_bytes + self._decoded_bytes

    @property
    def _decoded_bytes(self) -> int:
        return sum(plane.nbytes for plane in self._decoded)

    @property
    def host_bytes(self) -> int:
        return self._tier.host_bytes + sum(master.nbytes for master in self._masters.values())

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
        if not self._decoded and not all(self.format(unit).plain for unit in units):
            count = max(1 + len(template.moments) for template in self._templates)
            self._decoded = [torch.empty(self.chunk_numel, device=self._device) for _ in range(count)]
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
    def on_device(self, chunk: Chunk, optimizer: torch.optim.Optimizer, step: int) -> Iterator[nn.Parameter]:
        """Hold the chunk's state on the device, as ``optimizer``'s state of the yielded master [chunk.numel].

        The caller steps it; then the state is encoded, and the master weights, rounded, become the weights. All chunks
        of a unit must be stepped in order: the scalars they share (the step count) advance with the last.

        Args:
            step: of the run. What is rounded at random differs from step to step by it; not every optimizer counts its
                own.

        Raises:
            OffloadError: a transfer failed, now or since the last step.
        """
        if self.error is not None:
            raise self.error
        unit, template = chunk.unit, self.template(chunk.unit)
        stored, form = self._buffers.acquire(chunk), self.format(chunk.unit)
        kept = [plane[: chunk.numel] for plane in self._decoded[: 1 + len(template.moments)]]
        planes = stored if form.plain else kept
        weights = chunk.of(unit.shard)
        if unit not in self:
            planes[0].copy_(weights)
            for plane in planes[1:]:
                plane.zero_()
        elif unit in self._moved or not form.plain:
            form.decode(stored, weights.to(self._device), unit in self._moved, planes)
            if unit in self._masters:
                planes[0].copy_(chunk.of(self._masters[unit]))
        master, moments = nn.Parameter(planes[0]), dict(zip(template.moments, planes[1:], strict=True))
        scalars: Any = self._scalars.get(unit, template.start)
        if scalars is not None and (scalars or moments):
            optimizer.state[master] = {**copy.deepcopy(dict(scalars)), **moments}
        try:
            yield master
            scalars = _take_state(unit, optimizer.state.get(master, {}), moments)
            if not form.plain:
                form.encode(planes, stored, unit.dtype, digest(unit.name, unit.rank, step), chunk.start)
            weights.copy_(planes[0])  # not before: weights and what is stored of their master weights belong together
            self._buffers.release(chunk)
            if chunk.last:
                self._scalars[unit] = scalars
                self._forget(unit)
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
        self._forget(unit)
        self._write(unit, planes)
        self._scalars[unit] = copy.deepcopy(dict(scalars))
        self._assigned.add(unit)

    def _write(self, unit: Unit, planes: list[torch.Tensor]) -> None:
        form, device = self.format(unit), planes[0].device
        if form.plain:
            self._buffers.write(unit, planes)
            return
        stored = [torch.empty(p.numel(unit.shard_numel), dtype=p.dtype, device=device) for p in form.planes]
        form.encode(planes, stored, unit.dtype, digest(unit.name, unit.rank))
        self._buffers.write(unit, stored)
        weights = unit.shard.to(device)
        if form.needs_weights and not _same_bits(planes[0].to(unit.dtype), weights):
            self._masters[unit] = planes[0].clone()

    def _forget(self, unit: Unit) -> None:
        """Weights and master weights of the unit are in step again."""
        self._moved.discard(unit)
        self._assigned.discard(unit)
        self._masters.pop(unit, None)

    @contextmanager
    def moving(self, unit: Unit) -> Iterator[None]:
        """Inside, the caller moves the low-precision weights. Master weights, if any, follow when they are used next.

        Master weights that were set since the last step, as by ``safe_set_full_fp32_param``, become the weights first.
        """
        if unit in self._assigned:
            unit.shard.copy_(self[unit].master)
        self._masters.pop(unit, None)
        yield
        self._assigned.discard(unit)
        if unit in self:
            self._moved.add(unit)

    def ensure(self, unit: Unit) -> UnitState:
        """The unit's state, made from its weights if it has none yet."""
        if unit not in self:
            self.put(unit, UnitState(unit.shard.detach().to(torch.float32)))
        return self[unit]

    def stored(self, unit: Unit) -> dict[str, Any] | None:
        """The unit's state as it is kept, for a checkpoint: see :func:`unpack`. None if it is kept as it is."""
        form = self.format(unit)
        if form.plain:
            return None
        if unit in self._moved:  # what was encoded is of other weights
            state = self[unit]
            self._write(unit, [state.master, *state.moments.values()])
            self._moved.discard(unit)
        moments, planes = self.template(unit).moments, self._buffers.read(unit)
        kept = {"format": form.name, "dtype": unit.dtype, "moments": moments, "planes": planes}
        return {**kept, "master": self._masters.get(unit)}

    def drop(self, unit: Unit) -> None:
        """Delete the unit's state, if any; the next step makes it from the weights again."""
        if self._scalars.pop(unit, None) is None:
            return
        self._forget(unit)
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
        for held in (self._scalars, self._moved, self._assigned, self._masters, self._decoded):
            held.clear()
        try:
            self._buffers.close()
        finally:
            self._tier.close()
            self.trace.write()


def unpack(stored: Mapping[str, Any], weights: torch.Tensor, scalars: Mapping[str, Any]) -> UnitState:
    """The state of which :meth:`StateStore.stored` is the stored form.

    Args:
        weights: the low-precision weights [n] that belong to it, without padding.

    Returns:
        a state [n], without padding, in new host memory.
    """
    planes, moments, dtype = [plane.cpu() for plane in stored["planes"]], stored["moments"], stored["dtype"]
    numel = max(map(len, planes))
    padded = torch.nn.functional.pad(weights.to("cpu", dtype), (0, numel - len(weights)))
    state = [torch.empty(numel) for _ in range(1 + len(moments))]
    choose_format(stored["format"], moments, dtype).decode(planes, padded, False, state)
    master, *rest = (tensor[: len(weights)] for tensor in state)
    if stored["master"] is not None:
        master = stored["master"][: len(weights)]
    return UnitState(master, dict(zip(moments, rest, strict=True)), dict(scalars))


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


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
