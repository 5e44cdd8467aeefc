# SPDX-License-Identifier: Apache-2.0
"""The NVMe tier: state is kept in files, and passes through a few host buffers on its way.

[Note: Two threads] A reader and a writer thread move chunks between the disk and host buffers. A copy between a host
buffer and the device is issued by the thread that has the buffer at hand.

[Note: Cache] A buffer keeps its chunk until it is needed for another one. A load that finds the chunk in a buffer
takes it from there. A load of a chunk whose store is still queued waits for that store. So no file is read before what
was stored last is in it.

[Note: When files are written] If the buffers hold all chunks that the coming steps use, these are written when they
leave the active set, or at a flush: an SSD wears by bytes written. Otherwise a chunk is written after its step.
"""

import atexit
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.chunk_files import ChunkFiles
from grass_ds.offload.chunks import Chunk, StateLayout
from grass_ds.offload.copies import Copies, synchronize
from grass_ds.offload.host_buffers import HostBuffer, HostBuffers
from grass_ds.offload.io_thread import IOThread
from grass_ds.offload.state_files import OffloadError
from grass_ds.offload.tier import Planes, Tier, Transfer, issued

SPARE_BUFFERS = 2
"""Buffers that no chunk is read ahead into: one for a load that is needed now, one for a store."""

Issue = Callable[[HostBuffer], Any]
"""Issues a copy into or out of a buffer; returns its event."""


class NvmeTier(Tier):
    """See the notes above.

    Args:
        memory: of ``count`` host buffers, uint8.
        resources: closes files and memory; it is closed with the tier.
    """

    def __init__(
        self,
        files: ChunkFiles,
        memory: torch.Tensor,
        count: int,
        copies: Copies,
        layout: StateLayout,
        resources: ExitStack,
    ):
        self._files, self._copies, self._layout = files, copies, layout
        self.host_bytes, self.nvme_bytes = memory.nbytes, files.nbytes
        self._host_copies = Copies(copies.trace)
        pieces = (part.split(layout.capacities) for part in memory.chunk(count))
        self._buffers = HostBuffers(HostBuffer(list(each)) for each in pieces)
        self._lock = threading.Condition()
        self._queued: Counter[Chunk] = Counter()  # stores that the writer has not begun or not finished
        self._ahead: set[Chunk] = set()  # read-aheads that the reader has not finished
        self._planned: frozenset[Chunk] = frozenset()
        self._cached: frozenset[Chunk] = frozenset()  # written only when they leave the plan
        self._reader, self._writer = (IOThread(name, self._fail) for name in ("grass-read", "grass-write"))
        for thread in (self._reader, self._writer):
            thread.submit(copies.enter_thread)
        self._resources = resources.pop_all()  # released from the last to the first, and on if one of them raises
        threads = (self._reader.shutdown, self._writer.shutdown)
        for release in (self._buffers.clear, *(each.synchronize for each in self._buffers), *threads):
            self._resources.callback(release)
        atexit.register(self.close)

    # ---- copies to and from the device ------------------------------------------------------------------------------

    def plan(self, chunks: Sequence[Chunk]) -> None:
        with self._lock:
            self._planned = frozenset(chunks)
            self._cached = self._planned if len(chunks) <= len(self._buffers) - SPARE_BUFFERS else frozenset()
            for buffer in self._buffers:
                buffer.prefetched = buffer.prefetched and buffer.chunk in self._planned
            leaving = [buffer for buffer in self._buffers if buffer.dirty and buffer.chunk not in self._cached]
        for buffer in leaving:
            self._writer.submit(self._write, buffer)

    def read_ahead(self, chunks: Iterable[Chunk]) -> None:
        with self._lock:
            prefetched = sum(buffer.prefetched for buffer in self._buffers)
            room = len(self._buffers) - SPARE_BUFFERS - len(self._ahead) - prefetched
            for chunk in chunks:
                if room <= 0 or self.error is not None:
                    return
                if chunk in self._ahead or self._queued[chunk] or self._buffers.find(chunk) is not None:
                    continue
                self._ahead.add(chunk)
                room -= 1
                self._reader.submit(self._read_ahead, chunk)

    def load(self, chunk: Chunk, target: Planes, after: Sequence[Any], copies: Copies | None = None) -> Transfer:
        self._check()
        copy = (copies or self._copies).load

        def issue(buffer: HostBuffer) -> Any:
            pairs = zip(target, self._layout.views(chunk, buffer.memory), strict=True)
            return copy(pairs, [*after, buffer.event], str(chunk))

        with self._lock:
            buffer = None if self._queued[chunk] else self._buffers.find(chunk)
            if buffer is None:
                return self._reader.submit(self._read_and_copy, chunk, issue)
            self._buffers.acquire(buffer).prefetched = False
        return issued(self._copy_from(buffer, issue))

    def store(self, chunk: Chunk, source: Planes, after: Sequence[Any], copies: Copies | None = None) -> Transfer:
        self._check()
        copy = (copies or self._copies).store

        def issue(buffer: HostBuffer) -> Any:
            pairs = zip(self._layout.views(chunk, buffer.memory), source, strict=True)
            return copy(pairs, [*after, buffer.event], str(chunk))

        with self._lock:
            buffer = None if self._queued[chunk] else self._buffers.find(chunk)
            if buffer is None or buffer.writing:
                self._queued[chunk] += 1
                return self._writer.submit(self._store_queued, chunk, issue)
            # A write that was queued earlier does nothing while the buffer changes.
            self._buffers.acquire(buffer).dirty = False
        return issued(self._copy_into(buffer, issue, chunk))

    def _copy_from(self, buffer: HostBuffer, issue: Issue) -> Any:
        try:
            return buffer.copy(issue)
        finally:
            self._release(buffer)

    def _copy_into(self, buffer: HostBuffer, issue: Issue, chunk: Chunk) -> Any:
        """Copy into a buffer in use, and release it; the file follows, unless the chunk is cached."""
        try:
            event = buffer.copy(issue)
            buffer.dirty = buffer.filled = True
        finally:
            self._release(buffer)
        if chunk not in self._cached:
            self._writer.submit(self._write, buffer)
        return event

    # ---- in the reader thread ---------------------------------------------------------------------------------------

    def _read_ahead(self, chunk: Chunk) -> None:
        try:
            with self._lock:
                needed = chunk in self._planned and not self._queued[chunk] and self._buffers.find(chunk) is None
            if needed:
                buffer = self._read(chunk)
                with self._lock:
                    buffer.prefetched = chunk in self._planned
                self._release(buffer)
        finally:
            with self._lock:
                self._ahead.discard(chunk)

    def _read_and_copy(self, chunk: Chunk, issue: Issue) -> Any:
        buffer = self._read(chunk)
        buffer.prefetched = False
        return self._copy_from(buffer, issue)

    def _read(self, chunk: Chunk) -> HostBuffer:
        """A buffer in use that holds the chunk, read from the file if need be."""
        with self._lock:
            buffer = None
            while buffer is None:  # while it waits for room, the chunk may be stored
                self._lock.wait_for(lambda: not self._queued[chunk] or self.error is not None)
                self._check()
                buffer = self._buffers.find(chunk)
                if buffer is not None:
                    return self._buffers.acquire(buffer)
                buffer = self._try_assign(chunk)
        buffer.synchronize()
        self._files.read(chunk, buffer.memory)
        buffer.filled = True
        return buffer

    # ---- in the writer thread ---------------------------------------------------------------------------------------

    def _store_queued(self, chunk: Chunk, issue: Issue) -> Any:
        try:
            with self._lock:
                # A read-ahead of what is now replaced: that buffer is the chunk's, of which there must not be two.
                self._lock.wait_for(lambda: not self._buffers.is_filling(chunk) or self.error is not None)
                self._check()
                found = self._buffers.find(chunk)
                buffer = None if found is None else self._buffers.acquire(found)
                while buffer is None:
                    buffer = self._try_assign(chunk, in_writer=True)
            return self._copy_into(buffer, issue, chunk)
        except BaseException as error:
            self._fail(error)  # before the reader may take what is in the file
            raise
        finally:
            with self._lock:
                self._queued[chunk] -= 1
                self._lock.notify_all()

    def _write(self, buffer: HostBuffer) -> None:
        with self._lock:
            self._check()
            chunk = buffer.chunk
            if chunk is None or not buffer.dirty:
                return
            buffer.dirty, buffer.writing = False, True
        try:
            synchronize([buffer.event])
            self._files.write(chunk, buffer.memory)
        finally:
            with self._lock:
                buffer.writing = False
                self._lock.notify_all()

    # ---- between steps ----------------------------------------------------------------------------------------------

    def read(self, unit: Unit) -> Planes:
        planes = self._layout.planes_of(unit)
        stored = [torch.empty(plane.numel(unit.shard_numel), dtype=plane.dtype) for plane in planes]
        for chunk in self._layout.chunks(unit):
            self.load(chunk, self._layout.parts(chunk, stored), (), self._host_copies).result()
        return stored

    def write(self, unit: Unit, planes: Planes) -> None:
        self._files.add(unit)  # of a unit that never trains, whose state was set by hand
        self.nvme_bytes = self._files.nbytes
        for chunk in self._layout.chunks(unit):
            source = [part.to("cpu") for part in self._layout.parts(chunk, planes)]  # here, on the caller's stream
            self.store(chunk, source, (), self._host_copies).result()

    def drop(self, unit: Unit) -> None:
        with self._lock:
            self._buffers.drop(unit)
            self._lock.notify_all()

    def flush(self) -> None:
        self._check()
        self._wait_for_threads()  # queued stores leave more to write
        for buffer in self._buffers:
            self._writer.submit(self._write, buffer)
        self._wait_for_threads()
        self._check()

    def close(self) -> None:
        atexit.unregister(self.close)
        self._fail(OffloadError("the optimizer state was released by destroy()"))
        self._resources.close()
        self.host_bytes = self.nvme_bytes = 0

    # ---- buffers and threads ----------------------------------------------------------------------------------------

    def _try_assign(self, chunk: Chunk, in_writer: bool = False) -> HostBuffer | None:
        """A buffer for the chunk, in use and not filled; None after waiting. Called with the lock held."""
        self._check()
        buffer = self._buffers.next_idle(False, self._cached)
        if buffer is not None:
            return self._buffers.assign(buffer, chunk)
        dirty = self._buffers.next_idle(True, self._cached)
        if dirty is not None and in_writer:  # it would wait for itself
            self._lock.release()
            try:
                self._write(dirty)
            finally:
                self._lock.acquire()
            return None
        if dirty is not None:
            self._writer.submit(self._write, dirty)
        self._lock.wait()
        return None

    def _release(self, buffer: HostBuffer) -> None:
        with self._lock:
            buffer.users -= 1
            self._lock.notify_all()

    def _wait_for_threads(self) -> None:
        for thread in (self._reader, self._writer):
            thread.submit(int).result()

    def _fail(self, error: BaseException) -> BaseException:
        """Stop all transfers, and wake the threads that wait. Returns what their callers raise."""
        if not isinstance(error, OffloadError):
            cause, error = error, OffloadError(f"state could not be moved: {type(error).__name__}: {error}")
            error.__cause__ = cause
        with self._lock:
            self.error = self.error or error
            self._lock.notify_all()
        return error

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
