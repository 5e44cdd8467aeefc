# SPDX-License-Identifier: Apache-2.0
"""The device window: slots that hold the state of one chunk each while it is stepped.

[Note: Residency] One mechanism, three policies:
  ``stream``  at most ``device_buffers`` slots, all of chunk size and reused for ever. A chunk leaves when it was stepped; its slot takes
              the next chunk of the plan, whose load waits (on its stream) for the store before it.
  ``period``  a slot per chunk of the active set, kept as long as the chunk is active; the next set's chunks are loaded before the
              switch, those of the old one are stored after it and their slots freed when that is done.
  ``none``    a slot per chunk, kept for ever; there is no tier below.

[Note: Order] A step uses chunks in the order of the plan, so loads are issued in that order and never further ahead than there are
slots. ``pending`` is the last copy that touched a slot's memory: whoever uses the slot next, waits for it.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk
from grass_ds.offload.copies import Copies
from grass_ds.offload.state_files import OffloadError
from grass_ds.offload.tier import Planes, Ticket, Tier


@dataclass(eq=False)
class Slot:
    """Device memory for one chunk: planes of equal capacity."""

    planes: Planes
    pending: Ticket | None = None
    dirty: bool = False

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)


class Window:
    """Brings chunks to the device in the order of a plan, and lets them go.

    Args:
        tier: where state rests below; None with ``residency`` ``none``.
        planes_of: planes of a unit's state: one for the master weights and one per moment; ``max_planes`` of any unit.
        residency: ``stream``, ``period`` or ``none``, see [Note: Residency].
        buffers: slots of ``stream``.
        chunk_numel: elements of a slot of ``stream``.
        eager: the tier below may look ahead between steps, not only within one.

    Attributes:
        peak_bytes: high-water mark of :attr:`nbytes`.
    """

    def __init__(
        self,
        tier: Tier | None,
        copies: Copies,
        device: torch.device,
        *,
        planes_of: Callable[[Unit], int],
        max_planes: int,
        residency: str,
        buffers: int,
        chunk_numel: int,
        eager: bool,
    ):
        self._tier, self._copies, self._device = tier, copies, device
        self._planes_of, self._max_planes = planes_of, max_planes
        self._stored: Container[Unit] = ()
        self._streams, self._eager = residency == "stream", eager
        self._buffers, self._chunk_numel = buffers, chunk_numel
        self._slots: dict[Chunk, Slot] = {}
        self._free: deque[Slot] = deque()
        self._leaving: list[Slot] = []
        self._plan: list[Chunk] = []
        self._position: dict[Chunk, int] = {}
        self._next = 0  # of the plan: neither loaded nor used in this step yet
        self.peak_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held now."""
        return sum(slot.nbytes for slot in (*self._slots.values(), *self._free, *self._leaving))

    # ---- what is coming -------------------------------------------------------------------------------------------------

    def plan(self, chunks: Sequence[Chunk], stored: Container[Unit]) -> None:
        """The coming steps use ``chunks`` in this order; what else lies here leaves.

        Args:
            stored: units whose state exists, a live view; state of the others is made in its slot rather than loaded.
        """
        self._stored = stored
        self._plan, self._next = list(chunks), 0
        self._position = {chunk: index for index, chunk in enumerate(self._plan)}
        if self._tier is not None:
            for chunk in [chunk for chunk in self._slots if chunk not in self._position]:
                self._retire(chunk)
            self._tier.expect(self._plan if self._streams else ())
        self._sweep()
        if self._eager:
            self._look_ahead()

    def prefetch(self, chunks: Iterable[Chunk]) -> None:
        """Load these, and what the plan has before them, as far as there are slots. Called in backward: never waits for one."""
        if self._tier is None:
            return
        if not self._streams:
            self.prepare(chunks)
            return
        limit = 1 + max((self._position[chunk] for chunk in chunks), default=-1)
        while self._next < limit:
            chunk = self._plan[self._next]
            slot = self._slots.get(chunk) or self._unused_slot(wait=False)
            if slot is None:
                return
            self._occupy(chunk, slot)
            self._next += 1

    def prepare(self, chunks: Iterable[Chunk]) -> None:
        """Load what may be planned next beside what is here; nothing with ``stream``, which has no room for it."""
        if self._tier is None or self._streams:
            return
        for chunk in chunks:
            if chunk not in self._slots and chunk.unit in self._stored:
                self._load(chunk, self._new_slot(chunk))

    # ---- one step -------------------------------------------------------------------------------------------------------

    def take(self, chunk: Chunk) -> Planes:
        """The chunk's planes on the device, each [chunk.numel]; what is computed next comes after its load.

        For a unit that was never stored the planes hold anything: the caller fills them.
        """
        slot = self._slots.get(chunk)
        if slot is None:
            slot = self._room_for(chunk)
            self._occupy(chunk, slot)
        self._next = max(self._next, self._position.get(chunk, -1) + 1)
        if slot.pending is not None:
            self._copies.join(slot.pending.wait())
            slot.pending = None
        return self._views(slot, chunk)

    def give(self, chunk: Chunk) -> None:
        """The chunk was stepped: ``stream`` stores it and goes on to the next, the others keep it."""
        self._slots[chunk].dirty = self._tier is not None
        if not self._streams:
            return
        self._retire(chunk)
        self.prefetch(self._plan[-1:])
        self._look_ahead()

    def end_step(self) -> None:
        """The next step begins the plan anew."""
        self._next = 0
        self._sweep()
        if self._eager:
            self._look_ahead()

    # ---- from outside a step --------------------------------------------------------------------------------------------

    def forget(self, unit: Unit) -> None:
        """Let go of the unit's chunks without storing them."""
        for chunk in [chunk for chunk in self._slots if chunk.unit is unit]:
            slot = self._slots[chunk]
            _settle(slot)  # what it was loaded from may be overwritten next
            slot.dirty = False
            self._retire(chunk)
            self._next = min(self._next, self._position.get(chunk, self._next))
        self._sweep()

    def flush(self) -> None:
        """Store everything that is newer here than below; it stays here."""
        if self._tier is not None:
            for chunk, slot in self._slots.items():
                if slot.dirty:
                    self._store(chunk, slot)

    def resting(self, unit: Unit, chunks: Sequence[Chunk]) -> Planes:
        """The unit's planes as they lie on the device, without a tier: views, or a copy if it has several chunks."""
        parts = [self._views(self._slots[chunk], chunk) for chunk in chunks]
        return parts[0] if len(parts) == 1 else [torch.cat(pieces) for pieces in zip(*parts, strict=True)]

    def adopt(self, chunk: Chunk, planes: Planes) -> None:
        """Set a chunk's state on the device, without a tier."""
        slot = self._slots.get(chunk) or self._new_slot(chunk)
        self._slots[chunk] = slot
        for here, there in zip(self._views(slot, chunk), planes, strict=True):
            here.copy_(there)

    def close(self) -> None:
        """Wait for copies under way and release the memory."""
        for slot in (*self._slots.values(), *self._free, *self._leaving):
            with suppress(OffloadError):  # it has been raised, or nobody is left whom it could concern
                _settle(slot)
        self._slots.clear()
        self._free.clear()
        self._leaving.clear()

    # ---- slots ----------------------------------------------------------------------------------------------------------

    def _occupy(self, chunk: Chunk, slot: Slot) -> None:
        """Give the slot to the chunk, and load it if there is something to load."""
        if self._slots.get(chunk) is slot:
            return
        if self._tier is not None and chunk.unit in self._stored:
            self._load(chunk, slot)
        else:
            self._slots[chunk] = slot

    def _load(self, chunk: Chunk, slot: Slot) -> None:
        assert self._tier is not None
        # a slot that was stored from: the event of the store; new memory: whatever was computed in it before
        free = slot.pending.wait() if slot.pending is not None else self._copies.mark()
        slot.pending = self._tier.load(chunk, self._views(slot, chunk), [free])
        self._slots[chunk], slot.dirty = slot, False

    def _store(self, chunk: Chunk, slot: Slot) -> None:
        assert self._tier is not None
        slot.pending = self._tier.store(chunk, self._views(slot, chunk), [self._copies.mark()])
        slot.dirty = False

    def _room_for(self, chunk: Chunk) -> Slot:
        """A slot for a chunk that is needed now."""
        if not self._streams:
            return self._new_slot(chunk)
        slot = self._unused_slot()
        if slot is None:  # filled ahead with what turned out not to come next
            for other in list(self._slots):
                self._retire(other)
            slot = self._unused_slot()
            assert slot is not None
        return slot

    def _unused_slot(self, wait: bool = True) -> Slot | None:
        """A slot that holds nothing, None if all do; without ``wait`` also if the next one still waits for its store to be issued."""
        if self._free:
            pending = self._free[0].pending
            return self._free.popleft() if wait or pending is None or pending.settled else None
        if len(self._slots) < self._buffers:
            return self._allocate(self._chunk_numel, self._max_planes)
        return None

    def _new_slot(self, chunk: Chunk) -> Slot:
        return self._allocate(chunk.numel, self._planes_of(chunk.unit))

    def _allocate(self, numel: int, planes: int) -> Slot:
        self._sweep()
        slot = Slot([torch.empty(numel, dtype=torch.float32, device=self._device) for _ in range(planes)])
        self.peak_bytes = max(self.peak_bytes, self.nbytes + slot.nbytes)
        return slot

    def _retire(self, chunk: Chunk) -> None:
        """Let a chunk go: stored if it is newer here."""
        slot = self._slots[chunk]
        if slot.dirty:
            self._store(chunk, slot)
        del self._slots[chunk]
        (self._free if self._streams else self._leaving).append(slot)

    def _sweep(self) -> None:
        """Free the slots whose last copy has been issued; the allocator waits for the copy itself."""
        self._leaving = [slot for slot in self._leaving if slot.pending is not None and not slot.pending.settled]

    def _look_ahead(self) -> None:
        """Let the tier below get hold of what comes after the slots are full."""
        if self._streams and self._tier is not None:
            coming = islice(self._plan, self._next, None)
            self._tier.read_ahead(chunk for chunk in coming if chunk.unit in self._stored)

    def _views(self, slot: Slot, chunk: Chunk) -> Planes:
        return [plane.narrow(0, 0, chunk.numel) for plane in slot.planes[: self._planes_of(chunk.unit)]]


def _settle(slot: Slot) -> None:
    """Wait on the host for the slot's last copy."""
    if slot.pending is not None:
        event = slot.pending.wait()
        if event is not None:
            event.synchronize()
        slot.pending = None
