# SPDX-License-Identifier: Apache-2.0
"""The optimizer states of all units, wherever they are.

State is made when a unit is stepped for the first time: the fp32 master shard is then copied from the low-precision weights, which
have not moved until then, so nothing is lost and a layer that was never drawn costs nothing.

[Note: Errors] A transfer can fail on one rank alone, whose peers must hear of it where all of them are: in ``step`` and what else is
called on every rank (``agreement.raise_on_all_ranks``). What is done in backward or between steps is not such a place; it says nothing
and leaves the tier's ``error``, with which the next step ends.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk, chunks_of
from grass_ds.offload.device_buffers import Window
from grass_ds.offload.state_files import OffloadError
from grass_ds.offload.state_template import StateTemplate
from grass_ds.offload.tier import Planes, Tier
from grass_ds.offload.trace import Trace


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

    def map(self, move: Any) -> "UnitState":
        """A state whose tensors are ``move(tensor)``; scalars are shared."""
        return UnitState(move(self.master), {k: move(t) for k, t in self.moments.items()}, self.scalars)


class StateStore:
    """Optimizer states of all units that were ever stepped: a device window over a tier on the host or on disk.

    Args:
        tier: where states rest; None: on the device.
        templates: what the optimizer keeps, per param group.
        chunk_numel: elements that are moved and stepped at a time, a multiple of the chunks' grain.
        eager: transfers may begin in backward; otherwise only in the step.
    """

    def __init__(
        self,
        tier: Tier | None,
        window: Window,
        templates: Sequence[StateTemplate],
        *,
        chunk_numel: int,
        eager: bool,
        trace: Trace,
    ):
        self.trace = trace
        self.chunk_numel = chunk_numel
        self._tier, self._window, self._templates, self._eager = tier, window, templates, eager
        self._scalars: dict[Unit, dict[str, Any]] = {}
        self._chunks: dict[Unit, list[Chunk]] = {}
        self._planned: frozenset[Unit] = frozenset()

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._scalars

    def __getitem__(self, unit: Unit) -> UnitState:
        """The unit's state, to be read only: :meth:`put` changes it. On the host, or on the device if it rests there."""
        if self._tier is None:
            planes = self._window.resting(unit, self.chunks(unit))
        else:
            self._window.flush()
            planes = self._tier.fetch(unit)
        return UnitState(planes[0], dict(zip(self._moments(unit), planes[1:], strict=True)), self._scalars[unit])

    def template(self, unit: Unit) -> StateTemplate:
        """What the optimizer keeps for the unit."""
        return self._templates[unit.group]

    # ---- memory ---------------------------------------------------------------------------------------------------------

    @property
    def device_bytes(self) -> int:
        """Bytes on the device now, buffers included."""
        return self._window.nbytes

    @property
    def peak_device_bytes(self) -> int:
        return self._window.peak_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory now, buffers included."""
        return 0 if self._tier is None else self._tier.host_bytes

    @property
    def nvme_bytes(self) -> int:
        """Bytes on disk now, preallocated ones included."""
        return 0 if self._tier is None else self._tier.nvme_bytes

    @property
    def fallible(self) -> bool:
        """Whether states pass through files, which can fail on one rank alone."""
        return self._tier is not None and self._tier.nvme_bytes > 0

    @property
    def error(self) -> BaseException | None:
        """What went wrong in an I/O thread."""
        return None if self._tier is None else self._tier.error

    # ---- what is coming -------------------------------------------------------------------------------------------------

    def plan(self, units: Sequence[Unit]) -> None:
        """The coming steps step ``units``, in this order."""
        self._planned = frozenset(units)
        with suppress(OffloadError):
            self._window.plan([chunk for unit in units for chunk in self.chunks(unit)], self._scalars.keys())

    def prefetch(self, unit: Unit) -> None:
        """The unit's gradient is there, so it will be stepped soon."""
        if self._eager and unit in self._planned:
            with suppress(OffloadError):
                self._window.prefetch(self.chunks(unit))

    def prepare(self, units: Sequence[Unit]) -> None:
        """These units will probably be planned next."""
        if self._eager:
            with suppress(OffloadError):
                self._window.prepare([chunk for unit in units if unit in self for chunk in self.chunks(unit)])

    # ---- a step ---------------------------------------------------------------------------------------------------------

    def chunks(self, unit: Unit) -> list[Chunk]:
        """The pieces in which the unit is stepped, in order."""
        if unit not in self._chunks:
            numel = self.chunk_numel if self._tier is not None else unit.shard_numel
            self._chunks[unit] = chunks_of(unit, numel)
        return self._chunks[unit]

    @contextmanager
    def on_loan(self, chunk: Chunk, optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
        """Bring the chunk's state to the device, hand it to ``optimizer`` under the yielded master [chunk.numel], and take it back.

        All chunks of a unit must be borrowed, in order: their common scalars (the step count) move on with the last one.
        """
        if self.error is not None:
            raise self.error
        unit = chunk.unit
        template = self.template(unit)
        planes = self._window.take(chunk)
        scalars: Any = self._scalars.get(unit, template.start)
        if unit not in self:
            planes[0].copy_(chunk.of(unit.shard))
            for plane in planes[1:]:
                plane.zero_()
        master = nn.Parameter(planes[0])
        if scalars is not None and not template.keeps_nothing:
            optimizer.state[master] = {**copy.deepcopy(dict(scalars)), **self._named(unit, planes)}
        try:
            yield master
            self._take_back(chunk, planes, optimizer.state.get(master, {}))
        except BaseException:
            self._window.forget(unit)  # half stepped
            raise
        finally:
            optimizer.state.pop(master, None)

    def end_step(self) -> None:
        """The step is over, whether it changed anything or not."""
        with suppress(OffloadError):
            self._window.end_step()

    # ---- from outside a step --------------------------------------------------------------------------------------------

    def put(self, unit: Unit, state: UnitState) -> None:
        """Set the state of a unit (a checkpoint, or a user's own value). Moments that it lacks start at zero.

        Raises:
            ValueError: a moment that the optimizer does not keep, or none where it cannot start at zero.
        """
        template = self.template(unit)
        unknown = state.moments.keys() - set(template.moments)
        if unknown:
            raise ValueError(f"{unit.name}: the optimizer keeps no {sorted(unknown)}, only {list(template.moments)}")
        complete = bool(state.scalars) or len(state.moments) == len(template.moments)
        scalars = state.scalars if complete else template.start
        if scalars is None or (template.start is None and len(state.moments) < len(template.moments)):
            raise ValueError(f"{unit.name}: state of this optimizer cannot be set before the first step of the layer")
        zeros = torch.zeros((), device=state.master.device).expand(unit.shard_numel)
        planes = [state.master, *(state.moments.get(name, zeros) for name in template.moments)]
        self._window.forget(unit)
        if self._tier is None:
            for chunk in self.chunks(unit):
                self._window.adopt(chunk, [chunk.of(plane) for plane in planes])
        else:
            self._tier.place(unit, planes)
        self._scalars[unit] = copy.deepcopy(dict(scalars))

    def ensure(self, unit: Unit) -> UnitState:
        """The unit's state, made from its weights if it has none yet."""
        if unit not in self:
            self.put(unit, UnitState(unit.shard.detach().to(torch.float32)))
        return self[unit]

    def drop(self, unit: Unit) -> None:
        """Forget the unit's state; it is rebuilt from the weights at its next step."""
        if self._scalars.pop(unit, None) is None:
            return
        with suppress(OffloadError):
            self._window.forget(unit)
        if self._tier is not None:
            self._tier.drop(unit)

    def clear(self) -> None:
        """Forget all states."""
        for unit in list(self._scalars):
            self.drop(unit)

    def flush(self) -> None:
        """Block until every state is where it rests; raise what went wrong on the way."""
        self._window.flush()
        if self._tier is not None:
            self._tier.flush()

    def close(self) -> None:
        """Release device memory, host memory, threads and files; write the trace. Idempotent."""
        self._scalars.clear()
        try:
            self._window.close()
        finally:
            if self._tier is not None:
                self._tier.close()
            self.trace.write()

    # ---- inside ---------------------------------------------------------------------------------------------------------

    def _moments(self, unit: Unit) -> tuple[str, ...]:
        return self.template(unit).moments

    def _named(self, unit: Unit, planes: Planes) -> dict[str, torch.Tensor]:
        return dict(zip(self._moments(unit), planes[1:], strict=True))

    def _take_back(self, chunk: Chunk, planes: Planes, left: dict[str, Any]) -> None:
        """Sort what the optimizer left behind into moments and scalars, and let the chunk go."""
        moments = self._named(chunk.unit, planes)
        for name, plane in moments.items():
            if left[name] is not plane:  # the optimizer made its own, as at a first step
                plane.copy_(left[name])
        scalars = {name: value for name, value in left.items() if name not in moments}
        grown = [k for k, v in scalars.items() if torch.is_tensor(v) and v.numel() > 1]
        if grown:
            raise RuntimeError(
                f"{chunk.unit.name}: the optimizer began to keep {grown}, which it did not at the start"
            )
        self._window.give(chunk)
        if chunk.last:
            self._scalars[chunk.unit] = scalars
