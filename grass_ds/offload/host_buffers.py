# SPDX-License-Identifier: Apache-2.0
"""Host buffers between disk and device: a cache of chunks."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk
from grass_ds.offload.tier import Planes


@dataclass(eq=False)
class HostBuffer:
    """Host memory for one chunk.

    Attributes:
        planes: views of the memory, each [chunk_numel] float32.
        chunk: whose state it holds, also after it was used: a chunk that comes back soon is served from here.
        users: copies and transfers under way; the buffer keeps its chunk meanwhile.
        filled: it holds the chunk's state rather than waiting for it.
        dirty: newer than the file.
        writing: being written to the file.
        prefetched: read ahead and not used since.
        copy_lock: held while a copy is issued, so that ``event`` is that of the later one of two threads.
        event: device event of the last copy into or out of it.
        last_use: of a clock that every use advances.
    """

    planes: Planes
    chunk: Chunk | None = None
    users: int = 0
    filled: bool = False
    dirty: bool = False
    writing: bool = False
    prefetched: bool = False
    copy_lock: threading.Lock = field(default_factory=threading.Lock)
    event: Any = None
    last_use: int = 0

    @property
    def idle(self) -> bool:
        """Whether no thread works on it."""
        return not (self.users or self.writing)

    def views(self, numel: int, count: int) -> Planes:
        """The first ``numel`` elements of the first ``count`` planes."""
        return [plane.narrow(0, 0, numel) for plane in self.planes[:count]]

    def copy(self, issue: Callable[["HostBuffer"], Any]) -> Any:
        """``issue`` a copy into or out of it; returns the copy's event."""
        with self.copy_lock:
            event = issue(self)
            if event is not None:
                self.event = event
            return event

    def synchronize(self) -> None:
        """The host waits for the copies under way."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class HostBuffers:
    """The buffers, and which of them to use next. Not thread-safe: the tier holds its lock around every call."""

    def __init__(self, memory: Iterable[torch.Tensor], planes: int):
        self._buffers = [HostBuffer(list(part.view(torch.float32).chunk(planes))) for part in memory]
        self._clock = 0

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[HostBuffer]:
        return iter(self._buffers)

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for buffer in self for plane in buffer.planes)

    def find(self, chunk: Chunk) -> HostBuffer | None:
        """The buffer that holds the chunk's state."""
        return next((buffer for buffer in self if buffer.filled and buffer.chunk == chunk), None)

    def is_filling(self, chunk: Chunk) -> bool:
        """Whether a buffer waits for the chunk's state from the file."""
        return any(buffer.chunk == chunk and not buffer.filled for buffer in self)

    def acquire(self, buffer: HostBuffer) -> HostBuffer:
        """Count one more user."""
        self._clock += 1
        buffer.last_use, buffer.users = self._clock, buffer.users + 1
        return buffer

    def assign(self, buffer: HostBuffer, chunk: Chunk) -> HostBuffer:
        """From now on the buffer is the chunk's, and in use; it is not filled yet."""
        buffer.chunk, buffer.filled, buffer.prefetched = chunk, False, False
        return self.acquire(buffer)

    def reusable(self, cached: Collection[Chunk]) -> HostBuffer | None:
        """The clean idle buffer to reuse: not read ahead, not ``cached`` if possible, and used longest ago."""
        clean = [buffer for buffer in self if buffer.idle and not buffer.dirty]
        return min(clean, key=lambda b: (b.prefetched, b.chunk in cached, b.last_use), default=None)

    def oldest_dirty(self, cached: Collection[Chunk]) -> HostBuffer | None:
        """The idle buffer to write when none is reusable."""
        dirty = [buffer for buffer in self if buffer.idle and buffer.dirty]
        return min(dirty, key=lambda b: (b.chunk in cached, b.last_use), default=None)

    def drop(self, unit: Unit) -> None:
        """Empty the unit's buffers; those in use, or being written, are merely not written again."""
        for buffer in self:
            if buffer.chunk is not None and buffer.chunk.unit is unit:
                buffer.dirty = buffer.prefetched = False
                if buffer.idle:  # as long as its file changes, no thread may miss the chunk here
                    buffer.chunk, buffer.filled = None, False

    def clear(self) -> None:
        self._buffers.clear()
