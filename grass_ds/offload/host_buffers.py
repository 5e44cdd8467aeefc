# SPDX-License-Identifier: Apache-2.0
"""The host buffers between disk and device, which remember what they hold."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from grass_ds.offload.chunks import Chunk
from grass_ds.offload.tier import Planes


@dataclass(eq=False)
class Buffer:
    """Host memory for one chunk.

    Attributes:
        planes: views of the memory, each [chunk_numel] float32.
        chunk: whose state it holds, also after it has been used: a chunk that comes back soon is served from here.
        users: copies and transfers under way; the buffer keeps its chunk meanwhile.
        filled: it holds the chunk's state rather than waiting for it.
        dirty: newer than the file.
        writing: being written to the file.
        wanted: read ahead and not yet used.
        turn: held while a copy is issued: of two threads, the later one's event remains.
        event: device event of the last copy into or out of it.
        used: when it was used last, a counter.
    """

    planes: Planes
    chunk: Chunk | None = None
    users: int = 0
    filled: bool = False
    dirty: bool = False
    writing: bool = False
    wanted: bool = False
    turn: threading.Lock = field(default_factory=threading.Lock)
    event: Any = None
    used: int = 0

    def views(self, numel: int, count: int) -> Planes:
        """The first ``numel`` elements of the first ``count`` planes."""
        return [plane.narrow(0, 0, numel) for plane in self.planes[:count]]

    def synchronize(self) -> None:
        """Wait on the host for the copies under way."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None


class Staging:
    """The buffers, and which of them to use next. Not locked: the tier holds its lock around every call."""

    def __init__(self, memories: Iterable[torch.Tensor], planes: int):
        self.buffers = [Buffer(list(memory.view(torch.float32).chunk(planes))) for memory in memories]
        self._clock = 0

    def __len__(self) -> int:
        return len(self.buffers)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self.buffers)

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for buffer in self.buffers for plane in buffer.planes)

    def find(self, chunk: Chunk) -> Buffer | None:
        """The buffer that holds the chunk's state."""
        return next((b for b in self.buffers if b.filled and b.chunk == chunk), None)

    def filling(self, chunk: Chunk) -> bool:
        """Whether a buffer waits for the chunk's state from the file."""
        return any(b.chunk == chunk and not b.filled for b in self.buffers)

    def touch(self, buffer: Buffer) -> Buffer:
        """Take the buffer into use."""
        self._clock += 1
        buffer.used, buffer.users = self._clock, buffer.users + 1
        return buffer

    def assign(self, buffer: Buffer, chunk: Chunk) -> Buffer:
        """Let the buffer hold ``chunk`` from now on, and take it into use; it is not filled yet."""
        buffer.chunk, buffer.filled, buffer.wanted = chunk, False, False
        return self.touch(buffer)

    def reusable(self, keep: Collection[Chunk]) -> Buffer | None:
        """The idle buffer whose contents are missed least: the one not used for longest; None if all are busy."""
        idle = [b for b in self.buffers if not (b.users or b.dirty or b.writing)]
        return min(idle, key=lambda b: (b.wanted, b.chunk in keep, b.used), default=None)

    def oldest_dirty(self, keep: Collection[Chunk]) -> Buffer | None:
        """The buffer to write next when none is reusable."""
        dirty = [b for b in self.buffers if b.dirty and not b.writing and not b.users]
        return min(dirty, key=lambda b: (b.chunk in keep, b.used), default=None)

    def forget(self, matches: Callable[[Chunk], bool]) -> None:
        """Empty the buffers of these chunks; those in use, or being written, are merely not written again."""
        for buffer in self.buffers:
            if buffer.chunk is not None and matches(buffer.chunk):
                buffer.dirty = buffer.wanted = False
                if not (
                    buffer.users or buffer.writing
                ):  # as long as the file changes, nobody may find the chunk missing here
                    buffer.chunk, buffer.filled = None, False
