# SPDX-License-Identifier: Apache-2.0
"""Device buffers: each holds the state of one chunk while it is stepped.

[Note: Residency] One mechanism, three policies:
  ``stream``  at most ``device_buffers`` buffers of chunk size, reused for ever. A chunk is evicted once it was
              stepped; its buffer takes the next chunk of the plan, whose load waits (on its stream) for the store
              before it.
  ``period``  a buffer per chunk of the active set, kept as long as the chunk is active. The next set's chunks are
              loaded before the switch; those of the old set are stored after it, and their buffers freed when that is
              done.
  no tier     (``device: none``) a buffer per chunk, kept for ever.

[Note: Order] A step uses chunks in the order of the plan, so loads are issued in that order and never further ahead
than there are buffers. ``pending`` is the last copy into or out of a buffer: whoever uses the buffer next, waits for
it.
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
from grass_ds.offload.copies import Copies
from grass_ds.offload.state_files import OffloadError
from grass_ds.offload.tier import Planes, Tier, Transfer


@dataclass(eq=False)
class DeviceBuffer:
    """Device memory for one chunk: planes of equal capacity; ``dirty``: newer than the tier."""

    planes: Planes
    pending: Transfer | None = None
    dirty: bool = False

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    @property
    def is_issued(self) -> bool:
        """Whether the last copy has been issued, so that waiting for it does not block the host."""
        return self.pending is None or self.pending.done()

    def synchronize(self) -> None:
        """The host waits for the last copy."""
        event = self.pending.result() if self.pending is not None else None
        if event is not None:
            event.synchronize()
        self.pending = None


class DeviceBuffers:
    """Loads chunks in the order of a plan, and evicts them.

    Args:
        tier: where state is kept while it is not on the device; None: it stays on the device.
        config: ``residency``, ``device_buffers`` (of ``stream``) and ``prefetch``: ``backward`` lets transfers begin
            between steps.

    Attributes:
        peak_bytes: highest :attr:`nbytes` so far.
    """

    def __init__(
        self, tier: Tier | None, copies: Copies, device: torch.device, layout: StateLayout, config: OffloadConfig
    ):
        self._tier, self._copies, self._device, self._layout = tier, copies, device, layout
        self._streams = tier is not None and config.residency == "stream"
        self._max_buffers, self._eager = config.device_buffers, config.prefetch == "backward"
        self._stored: Container[Unit] = ()
        self._held: dict[Chunk, DeviceBuffer] = {}
        self._free: deque[DeviceBuffer] = deque()
        self._evicted: list[DeviceBuffer] = []
        self._plan: list[Chunk] = []
        self._position: dict[Chunk, int] = {}
        self._next = 0  # of the plan: neither loaded nor used in this step yet
        self.peak_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held now."""
        return sum(buffer.nbytes for buffer in self._all())

    # ---- before a step ----------------------------------------------------------------------------------------------

    def plan(self, chunks: Sequence[Chunk], stored: Container[Unit]) -> None:
        """The coming steps use ``chunks`` in this order; all others are evicted.

        Args:
            stored: units whose state exists, a live view; state of the others is made in its buffer rather than
                loaded.
        """
        self._stored = stored
        self._plan, self._next = list(chunks), 0
        self._position = {chunk: index for index, chunk in enumerate(self._plan)}
        if self._tier is not None:
            for chunk in [chunk for chunk in self._held if chunk not in self._position]:
                self._evict(chunk)
            self._tier.plan(self._plan if self._streams else ())
        self._free_evicted()
        if self._eager:
            self._read_ahead()

    def prefetch(self, chunks: Iterable[Chunk]) -> None:
        """These will be stepped soon. Called in backward, where transfers may begin if ``prefetch`` says so."""
        planned = [chunk for chunk in chunks if chunk in self._position]
        if not self._streams:
            self.prepare(planned)
        elif self._eager and planned:
            self._load_up_to(planned[-1])

    def prepare(self, chunks: Iterable[Chunk]) -> None:
        """Load what may be planned next beside what is here; nothing with ``stream``, which has no room for it."""
        if self._tier is None or self._streams or not self._eager:
            return
        for chunk in chunks:
            if chunk not in self._held and chunk.unit in self._stored:
                self._assign(chunk, self._allocate_for(chunk))

    # ---- in a step --------------------------------------------------------------------------------------------------

    def acquire(self, chunk: Chunk) -> Planes:
        """The chunk's planes on the device, each [chunk.numel]; what is computed next comes after its load.

        For a unit that was never stored the planes hold anything: the caller fills them.
        """
        if chunk not in self._held:
            self._assign(chunk, self._buffer_for(chunk))
        self._next = max(self._next, self._position.get(chunk, -1) + 1)
        buffer = self._held[chunk]
        if buffer.pending is not None:
            self._copies.compute_waits_for(buffer.pending.result())
            buffer.pending = None
        return self._views(buffer, chunk)

    def release(self, chunk: Chunk) -> None:
        """The chunk was stepped: ``stream`` stores it and loads the next ones, the others keep it."""
        self._held[chunk].dirty = self._tier is not None
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
        """Without a tier: views of the unit's planes, each [shard_numel]."""
        [chunk] = self._layout.chunks(unit)
        return self._views(self._held[chunk], chunk)

    def write(self, unit: Unit, planes: Planes) -> None:
        """Without a tier: set the unit's planes."""
        [chunk] = self._layout.chunks(unit)
        buffer = self._held[chunk] = self._allocate_for(chunk)
        for target, source in zip(self._views(buffer, chunk), planes, strict=True):
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
        """Load the plan up to this chunk, as far as there are buffers; never blocks the host."""
        while self._next <= self._position[last]:
            chunk = self._plan[self._next]
            if chunk not in self._held:
                buffer = self._unused_buffer()
                if buffer is None:
                    return
                if not buffer.is_issued:
                    self._free.appendleft(buffer)
                    return
                self._assign(chunk, buffer)
            self._next += 1

    def _read_ahead(self) -> None:
        """Let the tier read what comes after the chunks for which there are buffers."""
        if self._streams and self._tier is not None:
            coming = islice(self._plan, self._next, None)
            self._tier.read_ahead(chunk for chunk in coming if chunk.unit in self._stored)

    def _assign(self, chunk: Chunk, buffer: DeviceBuffer) -> None:
        """From now on the buffer holds the chunk; load it if it was ever stored."""
        if self._tier is not None and chunk.unit in self._stored:
            self._load(chunk, buffer)
        self._held[chunk] = buffer

    def _load(self, chunk: Chunk, buffer: DeviceBuffer) -> None:
        assert self._tier is not None
        # After the last copy out of the buffer; new memory: after whatever was computed in it before.
        free = buffer.pending.result() if buffer.pending is not None else self._copies.compute_event()
        buffer.pending = self._tier.load(chunk, self._views(buffer, chunk), [free])
        buffer.dirty = False

    def _store(self, chunk: Chunk, buffer: DeviceBuffer) -> None:
        assert self._tier is not None
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

    def _buffer_for(self, chunk: Chunk) -> DeviceBuffer:
        """A buffer for a chunk that is needed now."""
        if not self._streams:
            return self._allocate_for(chunk)
        buffer = self._unused_buffer()
        if buffer is None:  # all are filled ahead, with what turned out not to come next
            for other in list(self._held):
                self._evict(other)
            buffer = self._free.popleft()
        return buffer

    def _unused_buffer(self) -> DeviceBuffer | None:
        """A buffer of ``stream`` that holds no chunk, the one evicted first; None if all do."""
        if self._free:
            return self._free.popleft()
        if len(self._held) < self._max_buffers:
            return self._allocate(self._layout.chunk_numel, self._layout.max_planes)
        return None

    def _allocate_for(self, chunk: Chunk) -> DeviceBuffer:
        return self._allocate(chunk.numel, self._layout.planes_of(chunk.unit))

    def _allocate(self, numel: int, planes: int) -> DeviceBuffer:
        self._free_evicted()
        buffer = DeviceBuffer([torch.empty(numel, dtype=torch.float32, device=self._device) for _ in range(planes)])
        self.peak_bytes = max(self.peak_bytes, self.nbytes + buffer.nbytes)
        return buffer

    def _free_evicted(self) -> None:
        """Free evicted buffers whose last copy has been issued; the allocator waits for the copy itself."""
        self._evicted = [buffer for buffer in self._evicted if not buffer.is_issued]

    def _all(self) -> list[DeviceBuffer]:
        return [*self._held.values(), *self._free, *self._evicted]

    def _views(self, buffer: DeviceBuffer, chunk: Chunk) -> Planes:
        return [plane.narrow(0, 0, chunk.numel) for plane in buffer.planes[: self._layout.planes_of(chunk.unit)]]
