# SPDX-License-Identifier: Apache-2.0
"""The NVMe tier: states rest in files, and pass through a few host buffers on their way.

[Note: Three stages] disk -> host buffer -> device, and back. A reader and a writer thread, each with its own I/O object, do the disk
part; a copy to or from the device is issued by whoever has the buffer at hand, in the stream order of copies.py.

[Note: Forwarding] A buffer remembers its chunk until it is needed for another one. A load that finds the chunk in a buffer takes it
from there, whether or not the file is up to date; a load of a chunk whose store is still queued waits for that store. So nothing is
ever read from a file before what was stored last is in it.

[Note: When files are written] If the buffers hold all chunks that the coming steps use, those stay in host memory and are written when
they leave the active set (or at a flush): an SSD wears by bytes written, and a period of 25 steps would write each state 25 times.
Otherwise a chunk is written at once after its step.
"""

import atexit
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.block_io import BlockIO
from grass_ds.offload.chunks import Chunk, chunks_of
from grass_ds.offload.copies import Copies
from grass_ds.offload.host_buffers import Buffer, Staging
from grass_ds.offload.layout import Checksums, file_bytes, pieces
from grass_ds.offload.pinned_memory import StagingMemory
from grass_ds.offload.state_files import OffloadError, StateFiles
from grass_ds.offload.tier import Planes, Ticket
from grass_ds.offload.trace import Trace
from grass_ds.offload.worker import Worker

# Buffers that are never read ahead into: one for a load that is needed now, one for a store.
SPARE_BUFFERS = 2


class NvmeTier:
    """See the notes above.

    Args:
        files: this rank's state files.
        open_io: makes an I/O object; called once per direction.
        memory: host memory of the buffers; owned, and released by :meth:`close`.
        planes_of, max_planes: planes of a unit's state, and of any unit's.
        chunk_numel: elements of a chunk.
        checksum: remember a CRC-32 of every chunk written and compare it when it is read.
    """

    def __init__(
        self,
        files: StateFiles,
        open_io: Callable[[], BlockIO],
        memory: StagingMemory,
        copies: Copies,
        trace: Trace,
        *,
        planes_of: Callable[[Unit], int],
        max_planes: int,
        chunk_numel: int,
        checksum: bool,
    ):
        self.error: BaseException | None = None
        self._files, self._memory, self._copies, self._trace = files, memory, copies, trace
        self._host_copies = Copies(trace)
        self._planes_of, self._chunk_numel = planes_of, chunk_numel
        self._checksums = Checksums() if checksum else None
        self._staging = Staging(list(memory), max_planes)
        self._lock = threading.Condition()
        self._storing: Counter[Chunk] = Counter()  # stores that the writer has not begun or not finished
        self._ahead: set[Chunk] = set()  # read-aheads that the reader has not finished
        self._expected: frozenset[Chunk] = frozenset()
        self._keep: frozenset[Chunk] = frozenset()
        self._closed = False
        self._read_io, self._write_io = open_io(), open_io()
        self._reader = Worker("grass-read", copies.enter_thread, self._fail)
        self._writer = Worker("grass-write", copies.enter_thread, self._fail)
        atexit.register(self.close)

    @property
    def host_bytes(self) -> int:
        return 0 if self._closed else self._staging.nbytes

    @property
    def nvme_bytes(self) -> int:
        return 0 if self._closed else self._files.nbytes

    # ---- device side ----------------------------------------------------------------------------------------------------

    def load(self, chunk: Chunk, target: Planes, after: Sequence[Any]) -> Ticket:
        return self._load(chunk, target, after, self._copies)

    def store(self, chunk: Chunk, source: Planes, after: Sequence[Any]) -> Ticket:
        return self._store(chunk, source, after, self._copies)

    def expect(self, chunks: Sequence[Chunk]) -> None:
        with self._lock:
            self._expected = frozenset(chunks)
            self._keep = self._expected if len(chunks) <= len(self._staging) - SPARE_BUFFERS else frozenset()
            for buffer in self._staging:
                buffer.wanted = buffer.wanted and buffer.chunk in self._expected
            leaving = [b for b in self._staging if b.dirty and b.chunk not in self._keep]
        for buffer in leaving:
            self._submit_write(buffer)

    def read_ahead(self, chunks: Iterable[Chunk]) -> None:
        with self._lock:
            room = len(self._staging) - SPARE_BUFFERS - len(self._ahead) - sum(b.wanted for b in self._staging)
            for chunk in chunks:
                if room <= 0 or self.error is not None:
                    return
                if chunk in self._ahead or self._storing[chunk] or self._staging.find(chunk) is not None:
                    continue
                self._ahead.add(chunk)
                room -= 1
                self._reader.submit(partial(self._read_ahead, chunk))

    def _load(self, chunk: Chunk, target: Planes, after: Sequence[Any], copies: Copies) -> Ticket:
        self._raise_error()

        def copy(buffer: Buffer) -> Any:
            pairs = zip(target, buffer.views(chunk.numel, len(target)), strict=True)
            return copies.load(pairs, [*after, buffer.event], str(chunk))

        with self._lock:
            buffer = None if self._storing[chunk] else self._staging.find(chunk)
            if buffer is not None:
                self._staging.touch(buffer).wanted = False
        if buffer is not None:
            return Ticket.issued(self._copy(buffer, copy))
        ticket = Ticket()
        self._reader.submit(lambda: self._read(chunk, copy, ticket))
        return ticket

    def _store(self, chunk: Chunk, source: Planes, after: Sequence[Any], copies: Copies) -> Ticket:
        self._raise_error()

        def copy(buffer: Buffer) -> Any:
            pairs = zip(buffer.views(chunk.numel, len(source)), source, strict=True)
            return copies.store(pairs, [*after, buffer.event], str(chunk))

        with self._lock:
            buffer = None if self._storing[chunk] else self._staging.find(chunk)
            if buffer is not None and not buffer.writing:
                self._staging.touch(
                    buffer
                ).dirty = False  # a write that was queued earlier leaves it alone while it changes
            else:
                buffer = None
                self._storing[chunk] += 1
        if buffer is None:
            ticket = Ticket()
            self._writer.submit(lambda: self._accept(chunk, copy, ticket))
            return ticket
        event = self._copy(buffer, copy, dirties=True)
        if chunk not in self._keep:
            self._submit_write(buffer)
        return Ticket.issued(event)

    def _copy(self, buffer: Buffer, copy: Callable[[Buffer], Any], dirties: bool = False) -> Any:
        """Issue a copy into or out of a buffer in use, and let go of the buffer."""
        try:
            with buffer.turn:
                event = copy(buffer)
                if event is not None:
                    buffer.event = event
            if dirties:
                buffer.dirty = buffer.filled = True
            return event
        finally:
            self._release(buffer)

    # ---- the reader thread ----------------------------------------------------------------------------------------------

    def _read_ahead(self, chunk: Chunk) -> None:
        try:
            with self._lock:
                needed = chunk in self._expected and not self._storing[chunk]
                needed = needed and self._staging.find(chunk) is None
            if needed:
                buffer = self._filled(chunk)
                with self._lock:
                    buffer.wanted = chunk in self._expected
                self._release(buffer)
        finally:
            with self._lock:
                self._ahead.discard(chunk)

    def _read(self, chunk: Chunk, copy: Callable[[Buffer], Any], ticket: Ticket) -> None:
        try:
            buffer = self._filled(chunk)
            buffer.wanted = False
            ticket.settle(self._copy(buffer, copy))
        except BaseException as error:
            ticket.settle(error=self._fail(error))

    def _filled(self, chunk: Chunk) -> Buffer:
        """A buffer in use that holds the chunk, read from the file if need be."""
        with self._lock:
            buffer = None
            while buffer is None:  # while it waits for room, the chunk may be stored
                self._lock.wait_for(lambda: not self._storing[chunk] or self.error is not None)
                self._raise_error()
                buffer = self._staging.find(chunk)
                if buffer is not None:
                    return self._staging.touch(buffer)
                buffer = self._claim(chunk)
        buffer.synchronize()
        with self._trace.span("read", str(chunk)):
            self._read_io.read(file := self._files[chunk.unit.name], pieces(chunk, self._planes(chunk, buffer)))
        if self._checksums is not None:
            self._checksums.verify(chunk, self._views(chunk, buffer), file)
        buffer.filled = True
        return buffer

    # ---- the writer thread ----------------------------------------------------------------------------------------------

    def _accept(self, chunk: Chunk, copy: Callable[[Buffer], Any], ticket: Ticket) -> None:
        """Store a chunk for which no buffer was at hand."""
        try:
            with self._lock:
                # a read-ahead of what is now replaced: its buffer is the chunk's, there must not be two of them
                self._lock.wait_for(lambda: not self._staging.filling(chunk) or self.error is not None)
                self._raise_error()
                buffer = self._staging.find(chunk)
                buffer = None if buffer is None else self._staging.touch(buffer)
                while buffer is None:
                    buffer = self._claim(chunk, writer=True)
            ticket.settle(self._copy(buffer, copy, dirties=True))
            if chunk not in self._keep:
                self._write(buffer)
        except BaseException as error:
            ticket.settle(error=self._fail(error))
        finally:
            with self._lock:
                self._storing[chunk] -= 1
                if not self._storing[chunk]:
                    del self._storing[chunk]
                self._lock.notify_all()

    def _submit_write(self, buffer: Buffer) -> None:
        self._writer.submit(lambda: self._write(buffer))

    def _write(self, buffer: Buffer) -> None:
        """Bring the file up to date with the buffer; nothing to do if it is, or if its chunk was dropped."""
        with self._lock:
            self._raise_error()
            chunk = buffer.chunk
            if chunk is None or not buffer.dirty:
                return
            buffer.dirty, buffer.writing = False, True
        try:
            event = buffer.event
            if event is not None:
                event.synchronize()
            if self._checksums is not None:
                self._checksums.remember(chunk, self._views(chunk, buffer))
            with self._trace.span("write", str(chunk)):
                self._write_io.write(self._files[chunk.unit.name], pieces(chunk, self._planes(chunk, buffer)))
        finally:
            with self._lock:
                buffer.writing = False
                self._lock.notify_all()

    # ---- from outside a step --------------------------------------------------------------------------------------------

    def fetch(self, unit: Unit) -> Planes:
        planes = [torch.empty(unit.shard_numel, dtype=torch.float32) for _ in range(self._planes_of(unit))]
        for chunk in chunks_of(unit, self._chunk_numel):
            self._load(chunk, [chunk.of(plane) for plane in planes], (), self._host_copies).wait()
        return planes

    def place(self, unit: Unit, planes: Planes) -> None:
        # already there, but for a module that never trains and was set by hand
        self._files.add(unit.name, file_bytes(unit, self._planes_of(unit)))
        for chunk in chunks_of(unit, self._chunk_numel):
            source = [chunk.of(plane).to("cpu") for plane in planes]  # here, on the caller's stream
            self._store(chunk, source, (), self._host_copies).wait()

    def drop(self, unit: Unit) -> None:
        with self._lock:
            self._staging.forget(lambda chunk: chunk.unit is unit)
            self._lock.notify_all()

    def flush(self) -> None:
        self._raise_error()
        self._writer.wait_idle()  # stores under way may leave more to write
        with self._lock:
            dirty = [buffer for buffer in self._staging if buffer.dirty]
        for buffer in dirty:
            self._submit_write(buffer)
        self._writer.wait_idle()
        self._raise_error()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._fail(OffloadError("the optimizer state was released by destroy()"))
        with ExitStack() as release:  # from the last to the first, and on if one of them raises
            release.callback(self._files.close)
            release.callback(self._memory.close)
            release.callback(self._staging.buffers.clear)
            for io in (self._read_io, self._write_io):
                release.callback(io.close)
            for buffer in self._staging:
                release.callback(buffer.synchronize)
            for worker in (self._reader, self._writer):
                release.callback(worker.close)

    # ---- buffers --------------------------------------------------------------------------------------------------------

    def _claim(self, chunk: Chunk, writer: bool = False) -> Buffer | None:
        """A buffer for the chunk, in use and not filled. Called with the lock held; None after waiting, for the caller to ask anew."""
        self._raise_error()
        buffer = self._staging.reusable(self._keep)
        if buffer is not None:
            return self._staging.assign(buffer, chunk)
        dirty = self._staging.oldest_dirty(self._keep)
        if dirty is not None and writer:  # it would wait for itself
            self._lock.release()
            try:
                self._write(dirty)
            finally:
                self._lock.acquire()
            return None
        if dirty is not None:
            self._submit_write(dirty)
        self._lock.wait()
        return None

    def _release(self, buffer: Buffer) -> None:
        with self._lock:
            buffer.users -= 1
            self._lock.notify_all()

    def _planes(self, chunk: Chunk, buffer: Buffer) -> Planes:
        return buffer.planes[: self._planes_of(chunk.unit)]

    def _views(self, chunk: Chunk, buffer: Buffer) -> Planes:
        return buffer.views(chunk.numel, self._planes_of(chunk.unit))

    def _fail(self, error: BaseException) -> BaseException:
        """Nothing can be relied upon from here on; whoever waits, hears of it. Returns what they hear."""
        if not isinstance(error, OffloadError):
            cause, error = error, OffloadError(f"state could not be moved: {type(error).__name__}: {error}")
            error.__cause__ = cause
        with self._lock:
            self.error = self.error or error
            self._lock.notify_all()
        return error

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error
