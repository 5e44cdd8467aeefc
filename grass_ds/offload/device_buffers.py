# SPDX-License-Identifier: Apache-2.0
"""Device buffers: each holds the state of one chunk while it is stepped.

[Note: Residency] One mechanism, three policies:
  ``stream``  at most ``device_buffers`` buffers of chunk size. A chunk is evicted once it was stepped. Its buffer
              takes the next chunk of the plan, whose load waits (on its stream) for the store before it.
  ``period``  a buffer per chunk of the active set. The next set's chunks are loaded before the switch. Those of the
              old set are stored after it, and their buffers are then freed.
  ``device: none``  a buffer per chunk, kept for ever.

[Note: Order] A step uses chunks in the order of the plan, so loads are issued in that order and never further ahead
than there are buffers. Whoever uses a buffer waits for ``pending``, the last copy into or out of it.
"""

from collections import deque
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import torch

from grass_ds.config import OffloadConfig
from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk, StateLayout
from grass_ds.offload.copies import Copies, synchronize
from grass_ds.offload.state_files import OffloadError
from grass_ds.offload.tier import Planes, Tier, Transfer


@dataclass(eq=False)
class DeviceBuffer:
    """Device memory for one chunk: uint8, one piece per plane; ``dirty``: newer than the tier."""

    memory: Planes
    pending: Transfer | None = None
    dirty: bool = False

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.memory)

    @property
    def is_issued(self) -> bool:
        """Whether waiting for the last copy does not block the host."""
        return self.pending is None or self.pending.done()

    def synchronize(self) -> None:
        if self.pending is not None:
            synchronize([self.pending.result()])
            self.pending = None


class DeviceBuffers:
    """Loads chunks in the order of a plan, and evicts them.

    Attributes:
        keeps_all: nothing is evicted (``device: none``).
        stored: a view of the units that have state; only theirs is loaded.
        peak_bytes: highest :attr:`nbytes` so far.
    """

    def __init__(self, tier: Tier, copies: Copies, device: torch.device, layout: StateLayout, config: OffloadConfig):
        self._tier, self._copies, self._device, self._layout = tier, copies, device, layout
        self.keeps_all = config.device == "none"
        self._streams = not self.keeps_all and config.residency == "stream"
        self._max_buffers, self._eager = config.device_buffers, config.prefetch == "backward"
        self._held: dict[Chunk, DeviceBuffer] = {}
        self._free: deque[DeviceBuffer] = deque()
        self._evicted: list[DeviceBuffer] = []
        self._plan: list[Chunk] = []
        self._position: dict[Chunk, int] = {}
        self._next = 0  # of the plan: neither loaded nor used in this step yet
        self.stored: Container[Unit] = ()
        self.peak_bytes = 0

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._all())

    # ---- before a step ----------------------------------------------------------------------------------------------

    def plan(self, chunks: Sequence[Chunk]) -> None:
        """The coming steps use ``chunks`` in this order; all others are evicted."""
        self._plan, self._next = list(chunks), 0
        self._position = {chunk: index for index, chunk in enumerate(self._plan)}
        if not self.keeps_all:
            for chunk in [chunk for chunk in self._held if chunk not in self._position]:
                self._evict(chunk)
        self._tier.plan(self._plan if self._streams else ())
        self.end_step()

    def prefetch(self, chunks: Iterable[Chunk]) -> None:
        """These will be stepped soon. Called in backward, where transfers may begin if ``prefetch`` says so."""
        planned = [chunk for chunk in chunks if chunk in self._position]
        if not self._streams:
            self.prepare(planned)
        elif self._eager and planned:
            self._load_up_to(planned[-1])

    def prepare(self, chunks: Iterable[Chunk]) -> None:
        """Load what may be planned next beside what is here; nothing with ``stream``, which has no room for it."""
        if self._eager and not (self.keeps_all or self._streams):
            for chunk in chunks:
                if chunk not in self._held and chunk.unit in self.stored:
                    self._assign(chunk, self._allocate(chunk))

    # ---- in a step --------------------------------------------------------------------------------------------------

    def acquire(self, chunk: Chunk) -> Planes:
        """The chunk's planes on the device, loaded, or uninitialised if it was never stored."""
        if chunk not in self._held:
            buffer = self._unused_buffer(chunk)
            if buffer is None:  # all are filled ahead, with what turned out not to come next
                for other in list(self._held):
                    self._evict(other)
                buffer = self._free.popleft()
            self._assign(chunk, buffer)
        self._next = max(self._next, self._position.get(chunk, -1) + 1)
        buffer = self._held[chunk]
        if buffer.pending is not None:
            self._copies.compute_waits_for(buffer.pending.result())
            buffer.pending = None
        return self._views(buffer, chunk)

    def release(self, chunk: Chunk) -> None:
        """The chunk was stepped: ``stream`` stores it and loads the next ones, the others keep it."""
        self._held[chunk].dirty = not self.keeps_all
        if self._streams:
            self._evict(chunk)
            if self._plan:
                self._load_up_to(self._plan[-1])
            self._read_ahead()

    def end_step(self) -> None:
        """The next step begins the plan anew."""
        self._next = 0
        self._free_evicted()
        if self._eager:
            self._read_ahead()

    # ---- between steps ----------------------------------------------------------------------------------------------

    def discard(self, unit: Unit) -> None:
        """Free the unit's buffers without storing them."""
        for chunk in [chunk for chunk in self._held if chunk.unit is unit]:
            buffer = self._held[chunk]
            buffer.synchronize()  # the source of its load may be overwritten next
            buffer.dirty = False
            self._evict(chunk)
            self._next = min(self._next, self._position.get(chunk, self._next))
        self._free_evicted()

    def flush(self) -> None:
        """Store everything that is newer here than in the tier; it stays here."""
        for chunk, buffer in self._held.items():
            if buffer.dirty:
                self._store(chunk, buffer)

    def read(self, unit: Unit) -> Planes:
        """The unit's planes, read-only: on the host, or on the device without a tier."""
        if self.keeps_all:
            views = [self._views(self._held[chunk], chunk) for chunk in self._layout.chunks(unit)]
            return views[0] if len(views) == 1 else [torch.cat(parts) for parts in zip(*views, strict=True)]
        self.flush()
        return self._tier.read(unit)

    def write(self, unit: Unit, planes: Planes) -> None:
        self.discard(unit)
        if not self.keeps_all:
            self._tier.write(unit, planes)
            return
        for chunk in self._layout.chunks(unit):
            self._held[chunk] = self._allocate(chunk)
            parts = self._layout.parts(chunk, planes)
            for target, source in zip(self._views(self._held[chunk], chunk), parts, strict=True):
                target.copy_(source)

    def close(self) -> None:
        """Wait for copies under way and free the memory."""
        for buffer in self._all():
            with suppress(OffloadError):  # it has been raised, or no state is left that it could concern
                buffer.synchronize()
        self._held.clear()
        self._free.clear()
        self._evicted.clear()

    # ---- copies -----------------------------------------------------------------------------------------------------

    def _load_up_to(self, last: Chunk) -> None:
        """Load the plan up to this chunk as far as there are buffers, without blocking the host."""
        while self._next <= self._position[last]:
            chunk = self._plan[self._next]
            if chunk not in self._held:
                if self._free and not self._free[0].is_issued:
                    return
                buffer = self._unused_buffer(chunk)
                if buffer is None:
                    return
                self._assign(chunk, buffer)
            self._next += 1

    def _read_ahead(self) -> None:
        """Let the tier read what comes after the chunks for which there are buffers."""
        if self._streams:
            coming = islice(self._plan, self._next, None)
            self._tier.read_ahead(chunk for chunk in coming if chunk.unit in self.stored)

    def _assign(self, chunk: Chunk, buffer: DeviceBuffer) -> None:
        """From now on the buffer holds the chunk; load it if it was ever stored."""
        if chunk.unit in self.stored:
            # After the last copy out of the buffer; new memory: after whatever was computed in it before.
            free = buffer.pending.result() if buffer.pending is not None else self._copies.compute_event()
            buffer.pending = self._tier.load(chunk, self._views(buffer, chunk), [free])
        self._held[chunk] = buffer

    def _store(self, chunk: Chunk, buffer: DeviceBuffer) -> None:
        buffer.pending = self._tier.store(chunk, self._views(buffer, chunk), [self._copies.compute_event()])
        buffer.dirty = False

    def _evict(self, chunk: Chunk) -> None:
        """Free the chunk's buffer; it is stored if it is dirty."""
        buffer = self._held[chunk]
        if buffer.dirty:
            self._store(chunk, buffer)
        del self._held[chunk]
        (self._free if self._streams else self._evicted).append(buffer)

    # ---- memory -----------------------------------------------------------------------------------------------------

    def _unused_buffer(self, chunk: Chunk) -> DeviceBuffer | None:
        """A buffer that holds no chunk, with ``stream`` the one evicted first; None if it has no more."""
        if self._free:
            return self._free.popleft()
        return None if self._streams and len(self._held) >= self._max_buffers else self._allocate(chunk)

    def _allocate(self, chunk: Chunk) -> DeviceBuffer:
        """A new buffer for the chunk, and for any other one with ``stream``."""
        sizes = [plane.nbytes(chunk.numel) for plane in self._layout.planes_of(chunk.unit)]
        if self._streams:
            sizes = self._layout.capacities
        self._free_evicted()
        buffer = DeviceBuffer([torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes])
        self.peak_bytes = max(self.peak_bytes, self.nbytes + buffer.nbytes)
        return buffer

    def _free_evicted(self) -> None:
        """Free evicted buffers whose last copy has been issued; the allocator waits for the copy itself."""
        self._evicted = [buffer for buffer in self._evicted if not buffer.is_issued]

    def _all(self) -> list[DeviceBuffer]:
        return [*self._held.values(), *self._free, *self._evicted]

    def _views(self, buffer: DeviceBuffer, chunk: Chunk) -> Planes:
        return self._layout.views(chunk, buffer.memory)
