# SPDX-License-Identifier: Apache-2.0
"""The host tier: state is kept in (pinned) host memory."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk, StateLayout
from grass_ds.offload.copies import Copies, synchronize
from grass_ds.offload.pinned_memory import HostMemory
from grass_ds.offload.tier import Planes, Tier, Transfer, issued


class HostTier(Tier):
    """One set of planes per unit, made when it is stored for the first time; copies go straight there.

    A plane has memory of its own, from which a checkpoint is written without a copy. ``pin``: page-lock the planes.
    """

    def __init__(self, copies: Copies, layout: StateLayout, pin: bool):
        self._copies, self._layout, self._pin = copies, layout, pin
        self._memory: dict[Unit, list[HostMemory]] = {}
        self._states: dict[Unit, Planes] = {}
        self._events: defaultdict[Unit, dict[Chunk, Any]] = defaultdict(dict)  # of the last copy of each chunk

    def load(self, chunk: Chunk, target: Planes, after: Sequence[Any]) -> Transfer:
        events = self._events[chunk.unit]
        sources = self._layout.parts(chunk, self._states[chunk.unit])
        events[chunk] = self._copies.load(zip(target, sources, strict=True), [*after, events.get(chunk)], str(chunk))
        return issued(events[chunk])

    def store(self, chunk: Chunk, source: Planes, after: Sequence[Any]) -> Transfer:
        targets = self._layout.parts(chunk, self._state(chunk.unit))
        event = self._copies.store(zip(targets, source, strict=True), after, str(chunk))
        self._events[chunk.unit][chunk] = event
        return issued(event)

    def read(self, unit: Unit) -> Planes:
        self._synchronize(unit)
        return self._states[unit]

    def write(self, unit: Unit, planes: Planes) -> None:
        self._synchronize(unit)
        for here, there in zip(self._state(unit), planes, strict=True):
            here.copy_(there)

    def drop(self, unit: Unit) -> None:
        self._synchronize(unit)
        self._states.pop(unit, None)
        for memory in self._memory.pop(unit, ()):
            self.host_bytes -= memory.data.nbytes
            memory.close()

    def flush(self) -> None:
        for unit in self._states:
            self._synchronize(unit)

    def close(self) -> None:
        for unit in list(self._states):
            self.drop(unit)

    def _state(self, unit: Unit) -> Planes:
        if unit not in self._states:
            planes = self._layout.planes_of(unit)
            memory = [HostMemory(plane.nbytes(unit.shard_numel), self._pin) for plane in planes]
            self._memory[unit] = memory
            self.host_bytes += sum(piece.data.nbytes for piece in memory)
            self._states[unit] = [piece.data.view(plane.dtype) for plane, piece in zip(planes, memory, strict=True)]
        return self._states[unit]

    def _synchronize(self, unit: Unit) -> None:
        synchronize(self._events.pop(unit, {}).values())
