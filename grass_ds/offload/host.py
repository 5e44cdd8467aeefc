# SPDX-License-Identifier: Apache-2.0
"""The host tier: state is kept in (pinned) host memory."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import ELEMENT, Chunk
from grass_ds.offload.copies import Copies
from grass_ds.offload.pinned_memory import HostMemory
from grass_ds.offload.tier import Planes, Transfer, issued


class HostTier:
    """One set of planes per unit, made when it is stored for the first time; copies go straight there.

    Planes are whole units, so that a checkpoint is written from them without a copy.

    Args:
        pin: page-lock them, for copies that run beside compute. No effect where device memory is host memory.
    """

    def __init__(self, copies: Copies, pin: bool):
        self.error: BaseException | None = None
        self.nvme_bytes = 0
        self._copies = copies
        self._pin = pin and get_accelerator().device_name() != "cpu"
        self._states: dict[Unit, Planes] = {}
        self._memory: dict[Unit, list[HostMemory]] = {}
        self._events: dict[Unit, dict[Chunk, Any]] = {}  # of the last copy of each chunk

    def load(self, chunk: Chunk, target: Planes, after: Sequence[Any]) -> Transfer:
        events = self._events[chunk.unit]
        pairs = [(there, chunk.of(here)) for there, here in zip(target, self._states[chunk.unit], strict=True)]
        events[chunk] = self._copies.load(pairs, [*after, events.get(chunk)], str(chunk))
        return issued(events[chunk])

    def store(self, chunk: Chunk, source: Planes, after: Sequence[Any]) -> Transfer:
        state = self._state(chunk.unit, len(source))
        pairs = [(chunk.of(here), there) for here, there in zip(state, source, strict=True)]
        event = self._events[chunk.unit][chunk] = self._copies.store(pairs, after, str(chunk))
        return issued(event)

    def plan(self, chunks: Sequence[Chunk]) -> None:
        """Everything is here already."""

    def read_ahead(self, chunks: Iterable[Chunk]) -> None:
        """Everything is here already."""

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
        self._events.pop(unit, None)
        for memory in self._memory.pop(unit, ()):
            memory.close()

    def flush(self) -> None:
        for unit in self._states:
            self._synchronize(unit)

    def close(self) -> None:
        for unit in list(self._states):
            self.drop(unit)

    @property
    def host_bytes(self) -> int:
        return sum(plane.nbytes for planes in self._states.values() for plane in planes)

    def _state(self, unit: Unit, planes: int) -> Planes:
        if unit not in self._states:
            memory = [HostMemory(unit.shard_numel * ELEMENT, self._pin) for _ in range(planes)]
            self._memory[unit], self._events[unit] = memory, {}
            self._states[unit] = [part.data.view(torch.float32) for part in memory]
        return self._states[unit]

    def _synchronize(self, unit: Unit) -> None:
        """The host waits for the unit's copies under way."""
        events = self._events.get(unit, {})
        for event in events.values():
            if event is not None:
                event.synchronize()
        events.clear()
