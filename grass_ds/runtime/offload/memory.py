# SPDX-License-Identifier: Apache-2.0
"""Page-aligned host memory that state passes through between disk and device."""

import ctypes
import mmap
from collections.abc import Iterator

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
from deepspeed.utils.pin_memory import get_native_pinned_memory

from grass_ds.runtime.offload.files import ALIGNMENT

_LOCK_ON_FAULT = 1  # MLOCK_ONFAULT: counts against the limit, takes no memory


class StagingMemory:
    """``count`` buffers of ``nbytes`` bytes, all of one kind.

    Args:
        pin: page-lock them for copies to and from the device; no effect on the CPU accelerator.
        lock: page-lock them for AIO where they are not pinned, if the process may: otherwise it has to do without.

    Attributes:
        buffers: uint8 [nbytes] each, page-aligned, contents undefined.
        locked: whether they are page-locked, so that AIO accepts them.
    """

    def __init__(self, count: int, nbytes: int, pin: bool, lock: bool):
        if nbytes <= 0 or nbytes % ALIGNMENT:
            raise ValueError(f"buffers of {nbytes} bytes; a positive multiple of {ALIGNMENT} is wanted")
        if pin and get_accelerator().device_name() != "cpu":
            allocate = _pinned
        elif lock and _may_lock(count, nbytes):
            allocate = _locked
        else:
            allocate = _pageable
        self.locked = allocate is not _pageable
        self.buffers = [allocate(nbytes) for _ in range(count)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.buffers)

    def close(self) -> None:
        """Let go of the memory: it is freed with the last view of it. Idempotent."""
        self.buffers = []


def _pinned(nbytes: int) -> torch.Tensor:
    """Registered with the device, by the accelerator."""
    buffer = get_accelerator().pin_empty(nbytes, dtype=torch.uint8)
    if buffer.data_ptr() % ALIGNMENT:
        buffer = get_accelerator().pin_empty(nbytes + ALIGNMENT, dtype=torch.uint8)
    return buffer.narrow(0, -buffer.data_ptr() % ALIGNMENT, nbytes)


def _locked(nbytes: int) -> torch.Tensor:
    """Locked by DeepSpeed, which remembers it; freed with the last view."""
    return get_native_pinned_memory().pin_empty(torch.empty(0, dtype=torch.uint8), (nbytes,))


def _pageable(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def _may_lock(count: int, nbytes: int) -> bool:
    """Whether DeepSpeed will be able to lock that much: it can be loaded, and the kernel allows it.

    It is tried, since the limit depends on privileges and on what is locked already, and DeepSpeed aborts the process beyond it.
    """
    try:
        get_native_pinned_memory()
        lock = ctypes.CDLL(None, use_errno=True).mlock2
    except (RuntimeError, AttributeError) as error:
        logger.info(f"Staging memory is not page-locked: {error}")
        return False
    total = count * -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    trial = _pageable(total)
    return lock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(total), _LOCK_ON_FAULT) == 0
