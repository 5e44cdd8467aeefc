# SPDX-License-Identifier: Apache-2.0
"""Page-aligned host memory: exactly as much as is asked for, page-locked where that helps, and freed by ``close``.

[Note: Page-locking] torch's pinned allocator rounds every block up to a power of two and keeps what was freed; states
are large and long-lived. So memory is mapped here and registered with the device (``register_host_memory``), which
makes copies as fast and as asynchronous. The mapping is shared, not private: a forked data loader would otherwise make
pages copy-on-write under a transfer.
"""

import contextlib
import ctypes
import mmap
import weakref
from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from grass_ds.core import deepspeed_compat
from grass_ds.offload.state_files import ALIGNMENT

_LOCK_ON_FAULT = 1  # MLOCK_ONFAULT: counts against the limit, takes no memory


class HostMemory:
    """``nbytes`` bytes of page-aligned host memory.

    Args:
        pin: register it with the device. Where that fails (a limit, a driver) there is one warning, and copies are
            slower and do not overlap.

    Attributes:
        data: uint8 [nbytes], zeros.
        pinned: whether the device knows it.
    """

    def __init__(self, nbytes: int, pin: bool):
        self.data = _pageable(nbytes)
        self.pinned = pin and _register(self.data)
        self._unregister = weakref.finalize(self, _unregister, self.data.data_ptr()) if self.pinned else None
        if self._unregister is not None:
            self._unregister.atexit = False  # the device may be gone by then, and everything goes anyway

    def close(self) -> None:
        """Unregister it; it is freed with its last view. Copies must be over. Idempotent."""
        if self._unregister is not None:
            self._unregister()
        self.data = torch.empty(0, dtype=torch.uint8)


class BufferMemory:
    """Memory of ``count`` host buffers of ``nbytes`` bytes each.

    Args:
        pin: page-lock them for copies to and from the device; no effect on the CPU accelerator.
        lock: page-lock them for AIO where they are not pinned, if the process is allowed to.

    Attributes:
        buffers: uint8 [nbytes] each, page-aligned, zeros.
        locked: whether they are page-locked, so that AIO accepts them.
    """

    def __init__(self, count: int, nbytes: int, pin: bool, lock: bool):
        if nbytes <= 0 or nbytes % ALIGNMENT:
            raise ValueError(f"buffers of {nbytes} bytes; a positive multiple of {ALIGNMENT} is needed")
        self._pinned: list[HostMemory] = []
        pin = pin and get_accelerator().device_name() != "cpu"
        if not pin and lock and _may_lock(count, nbytes):
            self.buffers, self.locked = [_locked(nbytes) for _ in range(count)], True
            return
        memory = [HostMemory(nbytes, pin) for _ in range(count)]
        self.buffers, self.locked = [part.data for part in memory], all(part.pinned for part in memory)
        self._pinned = memory

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.buffers)

    def close(self) -> None:
        """Unregister the memory; it is freed with its last view. Idempotent."""
        for memory in self._pinned:
            memory.close()
        self.buffers, self._pinned = [], []


def _register(memory: torch.Tensor) -> bool:
    try:
        return deepspeed_compat.register_host_memory(memory.data_ptr(), memory.nbytes)
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError):  # the runtime reports the same failure once more, at the next kernel
            torch.zeros(1, device=get_accelerator().current_device_name())
        logger.warning_once(f"Host memory could not be page-locked, so copies will not overlap with compute: {error}")
        return False


def _unregister(address: int) -> None:
    deepspeed_compat.unregister_host_memory(address)


def _locked(nbytes: int) -> torch.Tensor:
    """Locked by DeepSpeed, whose AIO handles know it; freed with the last view.

    Zeros, since the rest of a page behind a chunk's end goes to the file as it is: what was in the heap may be the
    pattern by which AioIO tells that a read delivered nothing.
    """
    assert deepspeed_compat.get_native_pinned_memory is not None  # see _may_lock
    return deepspeed_compat.get_native_pinned_memory().pin_empty(torch.empty(0, dtype=torch.uint8), (nbytes,)).zero_()


def _pageable(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def _may_lock(count: int, nbytes: int) -> bool:
    """Whether DeepSpeed can be loaded and the kernel lets it lock that much.

    A trial, since the limit depends on privileges and on what is locked already, and DeepSpeed aborts the process
    beyond it.
    """
    if deepspeed_compat.get_native_pinned_memory is None:
        return False
    try:
        deepspeed_compat.get_native_pinned_memory()
        lock = ctypes.CDLL(None, use_errno=True).mlock2
    except (RuntimeError, AttributeError) as error:
        logger.info(f"Host buffers are not page-locked: {error}")
        return False
    total = count * -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    trial = _pageable(total)
    return lock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(total), _LOCK_ON_FAULT) == 0
