# SPDX-License-Identifier: Apache-2.0
"""Blocking transfers between page-aligned host memory and state files: DeepSpeed's AIO, or the kernel's own calls.

An object does one request after another: for overlap, make one per direction and use each from one thread.

[Note: Errors of AIO] DeepSpeed's ``aio_handle`` ignores the result of a request: a transfer that failed, or ended
early, counts as done. It aborts the process when it reads beyond the end of a file, waits for nothing, or is deleted
while requests are pending. Memory that is not page-locked goes through a locked buffer, whose allocation aborts at the
limit of locked memory. :class:`AioIO` avoids all of these, and verifies requests itself:

* Before a read, it writes a bit pattern into the first and last word of every page of the target; afterwards none may
  be left. A request that fails leaves all of its pages as they were, one that ends early its last pages. The pattern
  is a signalling NaN, which no arithmetic produces; this takes 1 % of the time of the read.
* After a write, it reads back the last page of every block (what AIO submits as one request). That takes a quarter of
  the time of the write, so it is done when a range is written for the first time: then a disk turns out to be smaller
  than it claims (thin provisioning, quotas, limits). Later writes verify the last block only, which fails with all
  others when the filesystem turns read-only. A single later block that is lost, on a disk which then delivers the old
  contents without an error, is found by ``"checksum": true`` when the state is read.

A page that fails is transferred once more by an ordinary call, whose error tells the cause.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from grass_ds.config import GrassConfigError
from grass_ds.core import deepspeed_compat
from grass_ds.offload.state_files import ALIGNMENT, OffloadError, StateFile

POSIX_THREADS = 4
"""Requests of PosixIO under way at a time. Two keep an SSD busy; four are for faster disks."""
_PATTERN = 0x7FB5A5E37FB9C6D7  # two fp32 signalling NaNs
_WORDS = ALIGNMENT // 8


@dataclass(frozen=True)
class Piece:
    """Contiguous bytes: ``tensor`` (1-D, whole pages of host memory, page-aligned) and their ``offset`` in the file.

    Raises:
        ValueError: an address, a length or an offset that is not a multiple of :data:`ALIGNMENT`, or no bytes at all.
    """

    tensor: torch.Tensor
    offset: int

    def __post_init__(self) -> None:
        tensor = self.tensor
        if tensor.dim() != 1 or not tensor.is_contiguous() or not tensor.is_cpu or not tensor.nbytes:
            raise ValueError(f"not a run of bytes in host memory: shape {tuple(tensor.shape)} on {tensor.device}")
        if tensor.data_ptr() % ALIGNMENT or tensor.nbytes % ALIGNMENT or self.offset % ALIGNMENT or self.offset < 0:
            raise ValueError(
                f"address {tensor.data_ptr():#x}, length {tensor.nbytes} and offset {self.offset} must be multiples "
                f"of {ALIGNMENT}"
            )

    @property
    def data(self) -> torch.Tensor:
        """The bytes, uint8 [nbytes]."""
        return self.tensor.view(torch.uint8)

    def part(self, start: int, nbytes: int) -> "Piece":
        return Piece(self.data.narrow(0, start, nbytes), self.offset + start)


class BlockIO(Protocol):
    """Whole requests: when a call returns, every byte has been transferred.

    Raises:
        OffloadError: naming the file, the offset and the cause; what was read (or the file) is then undefined.
        ValueError: a piece beyond the end of the file.
    """

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None: ...

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None: ...

    def close(self) -> None:
        """Release threads. Idempotent."""


@dataclass(frozen=True)
class AioSettings:
    """DeepSpeed's ``"aio"`` block; ``block_size`` (bytes) and ``intra_op_parallelism`` (threads) apply to both."""

    block_size: int
    queue_depth: int
    single_submit: bool
    overlap_events: bool
    intra_op_parallelism: int

    @classmethod
    def parse(cls, block: Mapping[str, Any]) -> "AioSettings":
        """Missing keys have DeepSpeed's defaults.

        Raises:
            GrassConfigError: a value with which AIO would abort the process.
        """
        defaults = deepspeed_compat.AIO_DEFAULT_DICT
        values = {**defaults, **{key: block[key] for key in defaults if block.get(key) is not None}}
        for key, least in (("block_size", ALIGNMENT), ("queue_depth", 1), ("intra_op_parallelism", 1)):
            value = values[key]
            if type(value) is not int or not least <= value < 2**31 or value % least:
                raise GrassConfigError(
                    f"aio.{key} = {value!r}: it must be an integer from {least} to 2^31 - 1"
                    + (f", a multiple of {least}" if least > 1 else "")
                )
        if values.pop("use_gds"):
            raise GrassConfigError(
                "aio.use_gds = true: GPUDirect storage is not used for the optimizer state, which passes through host "
                "buffers; set it to false"
            )
        return cls(**values)


class PosixIO:
    """``preadv`` and ``pwritev``, one call per block, a few of them at a time."""

    def __init__(self, settings: AioSettings):
        self._block_size = settings.block_size
        self._pool = ThreadPoolExecutor(max(POSIX_THREADS, settings.intra_op_parallelism), "grass-posix-io")

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        self._run(_read_block, file, pieces)

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        self._run(_write_block, file, pieces)

    def close(self) -> None:
        self._pool.shutdown()

    def _run(self, transfer: Callable[[StateFile, Piece], None], file: StateFile, pieces: Sequence[Piece]) -> None:
        _check_request(file, pieces)
        blocks = [block for piece in pieces for block in _split(piece, self._block_size)]
        requests = [self._pool.submit(transfer, file, block) for block in blocks]
        wait(requests)  # all of them, also after an error: the caller may reuse the memory
        for request in requests:
            request.result()


class AioIO:
    """DeepSpeed's ``aio_handle``, see [Note: Errors of AIO]. Pieces must be page-locked.

    With ``intra_op_parallelism`` above 1 a request is divided evenly among the threads; an ordinary call transfers the
    pages that remain.
    """

    def __init__(self, op: Any, settings: AioSettings):
        self._handle: Any = op.aio_handle(
            settings.block_size,
            settings.queue_depth,
            settings.single_submit,
            settings.overlap_events,
            settings.intra_op_parallelism,
        )
        self._threads = settings.intra_op_parallelism
        self._block_size = settings.block_size
        self._verified: set[tuple[Path, int, int]] = set()  # file, offset and length of writes verified block by block
        self._page = torch.frombuffer(mmap.mmap(-1, ALIGNMENT), dtype=torch.uint8)

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        _check_request(file, pieces)
        for piece in pieces:
            _pattern_words(piece).fill_(_PATTERN)
        self._run(self._handle.async_pread, _read_block, file, pieces)
        for piece in pieces:
            left = (_pattern_words(piece) == _PATTERN).any(dim=1)
            if left.any():
                page = piece.part(int(left.nonzero()[0]) * ALIGNMENT, ALIGNMENT)
                _read_block(file, page)
                raise _failure("read", file, page, "AIO reported success, but delivered nothing")

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        _check_request(file, pieces)
        self._run(self._handle.async_pwrite, _write_block, file, pieces)
        for piece in pieces:
            written = (file.path, piece.offset, piece.tensor.nbytes)
            for page in self._last_pages(piece)[-1 if written in self._verified else 0 :]:
                self._verify(file, page)
            self._verified.add(written)

    def close(self) -> None:
        self._handle = None

    def _run(
        self,
        submit: Callable[[torch.Tensor, str, int], int],
        transfer: Callable[[StateFile, Piece], None],
        file: StateFile,
        pieces: Sequence[Piece],
    ) -> None:
        if not all(self._handle.is_pinned(piece.tensor) for piece in pieces):
            raise ValueError("AIO needs page-locked memory")
        path = f"/proc/self/fd/{file.fd}"  # AIO opens by name; this name also works for a file that was deleted
        submitted = completed = 0
        try:
            for piece in pieces:
                even = self._even_bytes(piece)
                if even and submit(piece.data.narrow(0, 0, even), path, piece.offset) != 0:
                    raise _failure("open", file, piece, "AIO could not open it")
                submitted += bool(even)
        finally:
            if submitted:  # requests left pending abort the process, and so does waiting for none
                completed = self._handle.wait()
        if completed != submitted:
            raise _failure("transfer", file, pieces[0], f"AIO completed {completed} of {submitted} requests")
        for piece in pieces:
            even = self._even_bytes(piece)
            if even < piece.tensor.nbytes:
                transfer(file, piece.part(even, piece.tensor.nbytes - even))

    def _even_bytes(self, piece: Piece) -> int:
        """Bytes from the start of the piece that are equally many whole pages for every thread."""
        grain = self._threads * ALIGNMENT
        return piece.tensor.nbytes // grain * grain

    def _last_pages(self, piece: Piece) -> list[Piece]:
        """The last page of each block, which is what one thread submits at a time."""
        share = self._even_bytes(piece) // self._threads
        threads = [piece.part(thread * share, share) for thread in range(self._threads if share else 0)]
        blocks = [block for thread in threads for block in _split(thread, self._block_size)]
        return [block.part(block.tensor.nbytes - ALIGNMENT, ALIGNMENT) for block in blocks]

    def _verify(self, file: StateFile, page: Piece) -> None:
        _read_block(file, Piece(self._page, page.offset))
        if not torch.equal(self._page, page.data):
            _write_block(file, page)
            raise _failure("write", file, page, "AIO reported success, but the file has other contents")


def open_io(kind: str, aio: Mapping[str, Any], direct: bool, locked: bool) -> Callable[[], BlockIO]:
    """A function that makes a :class:`BlockIO`, of which each direction needs one.

    Args:
        kind: ``aio``, ``posix``, or ``auto``: AIO where it is available.
        aio: DeepSpeed's ``"aio"`` block.
        direct: whether the files are open for direct I/O, without which AIO is of no use.
        locked: whether the host buffers are page-locked, without which AIO would copy, and might abort the process.

    Raises:
        GrassConfigError: ``kind`` is ``aio``, which is not available, or a value in ``aio`` is wrong.
    """
    settings = AioSettings.parse(aio)
    if kind != "posix":
        try:
            return partial(AioIO, _load_aio(settings, direct, locked), settings)
        except _Unavailable as reason:
            if kind == "aio":
                raise GrassConfigError(f'grass.offload.io = "aio": {reason}; or use "auto" or "posix"') from reason
            logger.info(f"Optimizer state moves by preadv and pwritev instead of AIO: {reason}")
    return partial(PosixIO, settings)


class _Unavailable(RuntimeError):
    """Why AIO is not available, and the remedy."""


def _load_aio(settings: AioSettings, direct: bool, locked: bool) -> Any:
    """DeepSpeed's AIO extension, which is compiled at its first use."""
    if not direct:
        raise _Unavailable("the filesystem of grass.offload.nvme_path has no direct I/O; choose a local disk")
    if not os.path.exists("/proc/self/fd"):
        raise _Unavailable("/proc is not mounted; mount it")
    if deepspeed_compat.get_native_pinned_memory is None:
        raise _Unavailable(
            "the installed deepspeed has no page-locked memory that all AIO handles know; "
            "pip install 'deepspeed>=0.19.6,<0.20'"
        )
    try:
        op = get_accelerator().create_op_builder("AsyncIOBuilder").load(verbose=False)
    except Exception as error:  # whatever a missing compiler, header or library turns into
        raise _Unavailable(
            f"DeepSpeed's async_io cannot be built or loaded ({error}); install libaio-dev, a C++ compiler and ninja"
        ) from error
    if not locked:
        raise _Unavailable(
            "its memory cannot be page-locked; raise the limit (ulimit -l) or lower grass.offload.chunk_numel or "
            "host_buffers"
        )
    _check_contexts(op, settings)
    return op


def _check_contexts(op: Any, settings: AioSettings) -> None:
    """Set up the kernel's queues for a trial: two handles will do so, and ignore the result."""
    library, queue = ctypes.CDLL(op.__file__), ctypes.c_void_p()
    requests = 2 * (settings.intra_op_parallelism + 1) * settings.queue_depth
    error = library.io_queue_init(requests, ctypes.byref(queue))
    if error:
        raise _Unavailable(
            f"the kernel refuses queues for {requests} requests ({os.strerror(-error)}); lower aio.queue_depth or "
            "raise fs.aio-max-nr"
        )
    library.io_queue_release(queue)


def _check_request(file: StateFile, pieces: Sequence[Piece]) -> None:
    file.check()
    for piece in pieces:
        if piece.offset + piece.tensor.nbytes > file.nbytes:
            raise ValueError(
                f"{file.path}: {piece.tensor.nbytes} bytes at offset {piece.offset} end after {file.nbytes}"
            )


def _split(piece: Piece, block_size: int) -> list[Piece]:
    total = piece.tensor.nbytes
    return [piece.part(start, min(block_size, total - start)) for start in range(0, total, block_size)]


def _pattern_words(piece: Piece) -> torch.Tensor:
    """First and last word of every page, int64 [pages, 2], a view."""
    return piece.data.view(torch.int64).view(-1, _WORDS)[:, :: _WORDS - 1]


def _read_block(file: StateFile, piece: Piece) -> None:
    _transfer("read", os.preadv, file, piece)


def _write_block(file: StateFile, piece: Piece) -> None:
    _transfer("write", os.pwritev, file, piece)


def _transfer(verb: str, call: Callable[[int, list[Any], int], int], file: StateFile, piece: Piece) -> None:
    memory = memoryview(piece.data.numpy())
    done = 0
    while done < len(memory):
        try:
            count = call(file.fd, [memory[done:]], piece.offset + done)
        except OSError as error:
            raise _failure(verb, file, piece, str(error.strerror)) from error
        if count == 0:
            raise _failure(verb, file, piece, f"the file ends after {piece.offset + done} bytes")
        done += count


def _failure(verb: str, file: StateFile, piece: Piece, cause: str) -> OffloadError:
    return OffloadError(f"{file.path}: {verb} of {piece.tensor.nbytes} bytes at offset {piece.offset} failed: {cause}")
