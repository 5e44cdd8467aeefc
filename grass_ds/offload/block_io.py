# SPDX-License-Identifier: Apache-2.0
"""Blocking transfers between page-aligned host memory and state files: DeepSpeed's AIO, or the kernel's own calls.

An object does one request after another: for overlap, make one per direction and use each from one thread.

[Note: Errors of AIO] DeepSpeed's ``aio_handle`` ignores the result of a request: a transfer that failed, or ended
early, counts as done. It aborts the process when it reads beyond the end of a file, waits for nothing, or is deleted
while requests are pending. Memory that is not page-locked goes through a locked buffer, whose allocation aborts at the
limit of locked memory. :class:`AioIO` avoids all of these, and verifies requests itself:

* Before a read, it writes a bit pattern into the first and last word of every page of the target; afterwards none may
  be left. The pattern is a signalling NaN, which no arithmetic produces; this takes 1 % of the time of the read.
* After the first write of a range, it reads back the last page of every block (what AIO submits as one request), which
  takes a quarter of the time of the write: then a disk turns out to be smaller than it claims (thin provisioning,
  quotas, limits). Later writes verify the last block only, which fails with all others when the filesystem turns
  read-only. A single later block that is lost without an error is found by ``"checksum": true``.

A page that fails is transferred once more by an ordinary call, whose error tells the cause.
"""

import ctypes
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    """Whole pages of host memory (1-D, contiguous, page-aligned), and their ``offset`` in the file in bytes."""

    tensor: torch.Tensor
    offset: int

    @property
    def data(self) -> torch.Tensor:
        return self.tensor.view(torch.uint8)

    def part(self, start: int, nbytes: int) -> "Piece":
        return Piece(self.data.narrow(0, start, nbytes), self.offset + start)

    def blocks(self, nbytes: int) -> list["Piece"]:
        total = self.tensor.nbytes
        return [self.part(start, min(nbytes, total - start)) for start in range(0, total, nbytes)]


class BlockIO:
    """Whole requests: when a call returns, every byte has been transferred.

    Raises:
        OffloadError: naming the file, the offset and the cause; what was read (or the file) is then undefined.
    """

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        self._run("read", file, pieces)

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        self._run("write", file, pieces)

    def close(self) -> None:
        """Release threads. Idempotent."""

    def _run(self, verb: str, file: StateFile, pieces: Sequence[Piece]) -> None:
        raise NotImplementedError


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


class PosixIO(BlockIO):
    """``preadv`` and ``pwritev``, one call per block, a few of them at a time."""

    def __init__(self, settings: AioSettings):
        self._block_size = settings.block_size
        self._pool = ThreadPoolExecutor(max(POSIX_THREADS, settings.intra_op_parallelism), "grass-posix-io")

    def close(self) -> None:
        self._pool.shutdown()

    def _run(self, verb: str, file: StateFile, pieces: Sequence[Piece]) -> None:
        file.check()
        blocks = [block for piece in pieces for block in piece.blocks(self._block_size)]
        requests = [self._pool.submit(_transfer, verb, file, block) for block in blocks]
        wait(requests)  # all of them, also after an error: the caller may reuse the memory
        for request in requests:
            request.result()


class AioIO(BlockIO):
    """DeepSpeed's ``aio_handle``, see [Note: Errors of AIO]. Pieces must be page-locked.

    With ``intra_op_parallelism`` above 1 a request is divided evenly among the threads; an ordinary call transfers the
    pages that remain.
    """

    def __init__(self, op: Any, settings: AioSettings):
        self._handle: Any = op.aio_handle(*astuple(settings))
        self._threads = settings.intra_op_parallelism
        self._block_size = settings.block_size
        self._verified: set[tuple[Path, int, int]] = set()  # file, offset and length of writes verified block by block
        self._page = torch.frombuffer(mmap.mmap(-1, ALIGNMENT), dtype=torch.uint8)

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            _pattern_words(piece).fill_(_PATTERN)
        self._run("read", file, pieces)
        for piece in pieces:
            left = (_pattern_words(piece) == _PATTERN).any(dim=1)
            if left.any():
                page = piece.part(int(left.nonzero()[0]) * ALIGNMENT, ALIGNMENT)
                _transfer("read", file, page)
                raise _failure("read", file, page, "AIO reported success, but delivered nothing")

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        self._run("write", file, pieces)
        for piece in pieces:
            written = (file.path, piece.offset, piece.tensor.nbytes)
            for page in self._last_pages(piece)[-1 if written in self._verified else 0 :]:
                self._verify(file, page)
            self._verified.add(written)

    def close(self) -> None:
        self._handle = None

    def _run(self, verb: str, file: StateFile, pieces: Sequence[Piece]) -> None:
        file.check()
        submit = self._handle.async_pread if verb == "read" else self._handle.async_pwrite
        if not all(self._handle.is_pinned(piece.tensor) for piece in pieces):
            raise ValueError("AIO needs page-locked memory")
        path = f"/proc/self/fd/{file.fd}"  # AIO opens by name; this name also works for a file that was deleted
        submitted = False
        try:
            for piece in pieces:
                even = self._even_bytes(piece)
                if even and submit(piece.data.narrow(0, 0, even), path, piece.offset) != 0:
                    raise _failure("open", file, piece, "AIO could not open it")
                submitted = submitted or even > 0
        finally:
            if submitted:  # requests left pending abort the process, and so does waiting for none
                self._handle.wait()
        for piece in pieces:
            even = self._even_bytes(piece)
            if even < piece.tensor.nbytes:
                _transfer(verb, file, piece.part(even, piece.tensor.nbytes - even))

    def _even_bytes(self, piece: Piece) -> int:
        """Bytes from the start of the piece that are equally many whole pages for every thread."""
        grain = self._threads * ALIGNMENT
        return piece.tensor.nbytes // grain * grain

    def _last_pages(self, piece: Piece) -> list[Piece]:
        """The last page of each block, which is what one thread submits at a time."""
        even = self._even_bytes(piece)
        shares = piece.part(0, even).blocks(even // self._threads) if even else []
        blocks = [block for share in shares for block in share.blocks(self._block_size)]
        return [block.part(block.tensor.nbytes - ALIGNMENT, ALIGNMENT) for block in blocks]

    def _verify(self, file: StateFile, page: Piece) -> None:
        _transfer("read", file, Piece(self._page, page.offset))
        if not torch.equal(self._page, page.data):
            _transfer("write", file, page)
            raise _failure("write", file, page, "AIO reported success, but the file has other contents")


def open_io(kind: str, aio: Mapping[str, Any], direct: bool, locked: bool) -> Callable[[], BlockIO]:
    """A function that makes a :class:`BlockIO`, of which each direction needs one.

    Args:
        kind: ``aio``, ``posix``, or ``auto``: AIO where it is available.
        aio: DeepSpeed's ``"aio"`` block.
        direct: whether the files are open for direct I/O.
        locked: whether the host buffers are page-locked.

    Raises:
        GrassConfigError: AIO is asked for but not available, or a value in ``aio`` is wrong.
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
    if not direct:
        raise _Unavailable("the filesystem of grass.offload.nvme_path has no direct I/O; choose a local disk")
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
    # Set up the kernel's queues for a trial: two handles will do so, and ignore the result.
    library, queue = ctypes.CDLL(op.__file__), ctypes.c_void_p()
    requests = 2 * (settings.intra_op_parallelism + 1) * settings.queue_depth
    failure = library.io_queue_init(requests, ctypes.byref(queue))
    if failure:
        raise _Unavailable(
            f"the kernel refuses queues for {requests} requests ({os.strerror(-failure)}); lower aio.queue_depth or "
            "raise fs.aio-max-nr"
        )
    library.io_queue_release(queue)
    return op


def _pattern_words(piece: Piece) -> torch.Tensor:
    """First and last word of every page, int64 [pages, 2], a view."""
    return piece.data.view(torch.int64).view(-1, _WORDS)[:, :: _WORDS - 1]


def _transfer(verb: str, file: StateFile, piece: Piece) -> None:
    call: Callable[[int, list[Any], int], int] = os.preadv if verb == "read" else os.pwritev
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
