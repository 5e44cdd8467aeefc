# SPDX-License-Identifier: Apache-2.0
"""Host buffers between disk and device: a cache of chunks."""

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk
from grass_ds.offload.tier import Planes


@dataclass(eq=False)
class HostBuffer:
    """Host memory for one chunk: whole pages, uint8, one piece per plane."""

    memory: Planes
    chunk: Chunk | None = None  # kept after its use: a chunk that comes back soon is served from here
    users: int = 0  # copies and transfers under way; the buffer keeps its chunk meanwhile
    filled: bool = False  # it holds the chunk's state rather than waiting for it
    dirty: bool = False  # newer than the file
    writing: bool = False
    prefetched: bool = False  # read ahead and not used since
    copy_lock: threading.Lock = field(default_factory=threading.Lock)  # of two threads, ``event`` is the later one's
    event: Any = None  # of the last copy into or out of it
    last_use: int = 0

    @property
    def idle(self) -> bool:
        return not (self.users or self.writing)

    def copy(self, issue: Callable[["HostBuffer"], Any]) -> Any:
        """``issue`` a copy into or out of it; returns the copy's event."""
        with self.copy_lock:
            event = issue(self)
            if event is not None:
                self.event = event
            return event

    def synchronize(self) -> None:
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class HostBuffers(list[HostBuffer]):
    """The buffers, and which of them to use next. Not thread-safe: the tier holds its lock around every call."""

    _clock = 0

    def find(self, chunk: Chunk) -> HostBuffer | None:
        return next((buffer for buffer in self if buffer.filled and buffer.chunk == chunk), None)

    def is_filling(self, chunk: Chunk) -> bool:
        return any(buffer.chunk == chunk and not buffer.filled for buffer in self)

    def acquire(self, buffer: HostBuffer) -> HostBuffer:
        self._clock += 1
        buffer.last_use, buffer.users = self._clock, buffer.users + 1
        return buffer

    def assign(self, buffer: HostBuffer, chunk: Chunk) -> HostBuffer:
        """From now on the buffer is the chunk's, and in use; it is not filled yet."""
        buffer.chunk, buffer.filled, buffer.prefetched = chunk, False, False
        return self.acquire(buffer)

    def next_idle(self, dirty: bool, cached: Collection[Chunk]) -> HostBuffer | None:
        """The buffer to reuse, or if ``dirty`` to write: not read ahead, not ``cached`` if possible, the oldest."""
        idle = [buffer for buffer in self if buffer.idle and buffer.dirty == dirty]
        return min(idle, key=lambda b: (b.prefetched, b.chunk in cached, b.last_use), default=None)

    def drop(self, unit: Unit) -> None:
        """Empty the unit's buffers; those in use, or being written, are merely not written again."""
        for buffer in self:
            if buffer.chunk is not None and buffer.chunk.unit is unit:
                buffer.dirty = buffer.prefetched = False
                if buffer.idle:  # as long as its file changes, no thread may miss the chunk here
                    buffer.chunk, buffer.filled = None, False
