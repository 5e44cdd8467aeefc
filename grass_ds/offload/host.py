# SPDX-License-Identifier: Apache-2.0
"""The host tier: state is kept in (pinned) host memory."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import ELEMENT, Chunk
from grass_ds.offload.copies import Copies, synchronize
from grass_ds.offload.pinned_memory import HostMemory
from grass_ds.offload.tier import Planes, Tier, Transfer, issued


class HostTier(Tier):
    """One set of planes per unit, made when it is stored for the first time; copies go straight there.

    A plane has memory of its own, from which a checkpoint is written without a copy. ``pin``: page-lock the planes.
    """

    def __init__(self, copies: Copies, pin: bool):
        self._copies, self._pin = copies, pin
        self._memory: dict[Unit, list[HostMemory]] = {}
        self._states: dict[Unit, Planes] = {}
        self._events: defaultdict[Unit, dict[Chunk, Any]] = defaultdict(dict)  # of the last copy of each chunk

    def load(self, chunk: Chunk, target: Planes, after: Sequence[Any]) -> Transfer:
        events = self._events[chunk.unit]
        sources = map(chunk.of, self._states[chunk.unit])
        events[chunk] = self._copies.load(zip(target, sources, strict=True), [*after, events.get(chunk)], str(chunk))
        return issued(events[chunk])

    def store(self, chunk: Chunk, source: Planes, after: Sequence[Any]) -> Transfer:
        targets = map(chunk.of, self._state(chunk.unit, len(source)))
        event = self._copies.store(zip(targets, source, strict=True), after, str(chunk))
        self._events[chunk.unit][chunk] = event
        return issued(event)

    def read(self, unit: Unit) -> Planes:
        self._synchronize(unit)
        return self._states[unit]

    def write(self, unit: Unit, planes: Planes) -> None:
        self._synchronize(unit)
        for here, there in zip(self._state(unit, len(planes)), planes, strict=True):
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

    def _state(self, unit: Unit, planes: int) -> Planes:
        if unit not in self._states:
            self._memory[unit] = [HostMemory(unit.shard_numel * ELEMENT, self._pin) for _ in range(planes)]
            self.host_bytes += planes * unit.shard_numel * ELEMENT
            self._states[unit] = [memory.data.view(torch.float32) for memory in self._memory[unit]]
        return self._states[unit]

    def _synchronize(self, unit: Unit) -> None:
        synchronize(self._events.pop(unit, {}).values())
