# SPDX-License-Identifier: Apache-2.0
"""Blocking transfers between page-aligned host memory and state files: DeepSpeed's AIO, or the kernel's own calls.

An object does one request after another: for overlap, make one per direction and use each from one thread.

[Note: What AIO does not say] DeepSpeed's ``aio_handle`` never looks at the result of a request: a transfer that failed, or ended
early, counts as done. It aborts the process when asked to read beyond the end of a file, to wait for nothing, or to go away while
requests are pending; memory that is not page-locked it copies through a locked buffer, whose allocation aborts at the limit of
locked memory. So :class:`AioIO` asks for none of these, and finds out by itself what came of a request:

* Before a read, a bit pattern is written into the first and last word of every page of the target, and none of them may be left
  afterwards. A request that fails leaves all of its pages as they were, one that ends early the last of them. The pattern is a
  signalling NaN, which no arithmetic produces; filling and looking take 1 % of the time of the read.
* After a write, the last page of every block (what AIO submits as one request) is read back. That takes a quarter of the time of
  the write, so it is done when a place is written for the first time, which is when a disk turns out to be smaller than it claims
  (thin provisioning, quotas, limits); afterwards only for the last block, which fails with all others when the filesystem turns
  read-only. That leaves the loss of a single later block, on a disk which then delivers the old contents without an error:
  ``"checksum": true`` finds it when the state is read.

The page at which something was found is then transferred by an ordinary call, for the cause.
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

# Requests of PosixIO under way at a time. One keeps a disk busy for about three quarters of the time, two are enough here; four for
# disks that are faster than a copy in memory.
POSIX_THREADS = 4
_PATTERN = 0x7FB5A5E37FB9C6D7  # two fp32 signalling NaNs
_WORDS = ALIGNMENT // 8


@dataclass(frozen=True)
class Piece:
    """A contiguous run of bytes: ``tensor`` (1-D, page-aligned, whole pages, host memory) and where it is in the file.

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
                f"address {tensor.data_ptr():#x}, length {tensor.nbytes} and offset {self.offset} must be multiples of {ALIGNMENT}"
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
        OffloadError: naming the file, the place in it and the cause. The contents of the pieces (of the file) are then undefined.
        ValueError: a piece beyond the end of the file.
    """

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None: ...

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None: ...

    def close(self) -> None:
        """Release threads. Idempotent."""


@dataclass(frozen=True)
class AioSettings:
    """DeepSpeed's ``"aio"`` block. ``block_size`` (bytes) and ``intra_op_parallelism`` (threads) hold for both kinds."""

    block_size: int
    queue_depth: int
    single_submit: bool
    overlap_events: bool
    intra_op_parallelism: int

    @classmethod
    def parse(cls, block: Mapping[str, Any]) -> "AioSettings":
        """Missing keys have DeepSpeed's defaults.

        Raises:
            GrassConfigError: a value that AIO would not survive.
        """
        values = {
            key: value if block.get(key) is None else block[key]
            for key, value in deepspeed_compat.AIO_DEFAULT_DICT.items()
        }
        for key, least in (("block_size", ALIGNMENT), ("queue_depth", 1), ("intra_op_parallelism", 1)):
            value = values[key]
            if type(value) is not int or not least <= value < 2**31 or value % least:
                raise GrassConfigError(
                    f"aio.{key} = {value!r}: it must be an integer from {least} to 2^31 - 1"
                    + (f", a multiple of {least}" if least > 1 else "")
                )
        if values.pop("use_gds"):
            raise GrassConfigError(
                "aio.use_gds = true: GPUDirect storage is not used for the optimizer state, which passes through host buffers; set it "
                "to false"
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
    """DeepSpeed's ``aio_handle``, see [Note: What AIO does not say]. Pieces must be page-locked.

    With ``intra_op_parallelism`` above 1 a request is divided evenly among the threads; the pages that cannot be are transferred by
    an ordinary call.
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
        self._proven: set[tuple[Path, int, int]] = (
            set()
        )  # file, offset and length of the writes that were checked block by block
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
            place = (file.path, piece.offset, piece.tensor.nbytes)
            for page in self._last_pages(piece)[-1 if place in self._proven else 0 :]:
                self._prove(file, page)
            self._proven.add(place)

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
        path = f"/proc/self/fd/{file.fd}"  # it opens by name; this one also leads to a file that was deleted
        submitted = completed = 0
        try:
            for piece in pieces:
                even = self._even_bytes(piece)
                if even and submit(piece.data.narrow(0, 0, even), path, piece.offset) != 0:
                    raise _failure("open", file, piece, "AIO could not open it")
                submitted += bool(even)
        finally:
            if submitted:  # neither may be left pending, nor waited for in vain: both abort the process
                completed = self._handle.wait()
        if completed != submitted:
            raise _failure("transfer", file, pieces[0], f"AIO completed {completed} of {submitted} requests")
        for piece in pieces:
            even = self._even_bytes(piece)
            if even < piece.tensor.nbytes:
                transfer(file, piece.part(even, piece.tensor.nbytes - even))

    def _even_bytes(self, piece: Piece) -> int:
        """Bytes from the start of the piece that make a run of whole pages for every thread."""
        grain = self._threads * ALIGNMENT
        return piece.tensor.nbytes // grain * grain

    def _last_pages(self, piece: Piece) -> list[Piece]:
        """The last page of each block, a block being what one thread submits at a time."""
        share = self._even_bytes(piece) // self._threads
        threads = [piece.part(thread * share, share) for thread in range(self._threads if share else 0)]
        blocks = [block for thread in threads for block in _split(thread, self._block_size)]
        return [block.part(block.tensor.nbytes - ALIGNMENT, ALIGNMENT) for block in blocks]

    def _prove(self, file: StateFile, page: Piece) -> None:
        _read_block(file, Piece(self._page, page.offset))
        if not torch.equal(self._page, page.data):
            _write_block(file, page)
            raise _failure("write", file, page, "AIO reported success, but the file has other contents")


def open_io(kind: str, aio: Mapping[str, Any], direct: bool, locked: bool) -> Callable[[], BlockIO]:
    """How to make a :class:`BlockIO`; one is wanted per direction.

    Args:
        kind: ``aio``, ``posix``, or ``auto``: AIO where it can be had.
        aio: DeepSpeed's ``"aio"`` block.
        direct: whether the files are open for direct I/O, without which AIO has no use.
        locked: whether the staging memory is page-locked, without which AIO would copy, and may abort the process.

    Raises:
        GrassConfigError: ``aio`` was asked for and cannot be had, or a value in ``aio`` is wrong.
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
    """Why AIO cannot be had, and what would help."""


def _load_aio(settings: AioSettings, direct: bool, locked: bool) -> Any:
    """DeepSpeed's AIO extension, compiled now if it never was."""
    if not direct:
        raise _Unavailable("the filesystem of grass.offload.nvme_path has no direct I/O; choose a local disk")
    if not os.path.exists("/proc/self/fd"):
        raise _Unavailable("/proc is not mounted; mount it")
    if deepspeed_compat.get_native_pinned_memory is None:
        raise _Unavailable(
            "the installed deepspeed has no page-locked memory that all AIO handles know; pip install 'deepspeed>=0.19.6,<0.20'"
        )
    try:
        op = get_accelerator().create_op_builder("AsyncIOBuilder").load(verbose=False)
    except Exception as error:  # whatever a missing compiler, header or library turns into
        raise _Unavailable(
            f"DeepSpeed's async_io cannot be built or loaded ({error}); install libaio-dev, a C++ compiler and ninja"
        ) from error
    if not locked:
        raise _Unavailable(
            "its memory cannot be page-locked; raise the limit (ulimit -l) or lower grass.offload.chunk_numel or host_buffers"
        )
    _check_contexts(op, settings)
    return op


def _check_contexts(op: Any, settings: AioSettings) -> None:
    """Try what two handles will do without looking at the result: set up the kernel's queues."""
    library, queue = ctypes.CDLL(op.__file__), ctypes.c_void_p()
    requests = 2 * (settings.intra_op_parallelism + 1) * settings.queue_depth
    error = library.io_queue_init(requests, ctypes.byref(queue))
    if error:
        raise _Unavailable(
            f"the kernel refuses queues for {requests} requests ({os.strerror(-error)}); lower aio.queue_depth or raise fs.aio-max-nr"
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
