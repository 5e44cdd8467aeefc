# SPDX-License-Identifier: Apache-2.0
"""Page-aligned host memory: exactly as much as is asked for, page-locked where that helps, and freed by ``close``.

[Note: Page-locking] torch's pinned allocator rounds every block up to a power of two and keeps what was freed. So
memory is mapped here and registered with the device (``register_host_memory``). The mapping is shared, not private: a
forked data loader would otherwise make pages copy-on-write under a transfer.
"""

import contextlib
import ctypes
import mmap
import weakref

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from grass_ds.core import deepspeed_compat

_LOCK_ON_FAULT = 1  # MLOCK_ONFAULT: counts against the limit, takes no memory


class HostMemory:
    """``nbytes`` bytes of page-aligned host memory.

    Args:
        pin: register it with the device, if there is one. If that fails, there is one warning.
        lock: page-lock it for AIO if it is not pinned and the process is allowed to.

    Attributes:
        data: uint8 [nbytes], zeros.
        locked: whether it is page-locked, so that copies overlap with compute and AIO accepts it.
    """

    def __init__(self, nbytes: int, pin: bool, lock: bool = False):
        self._unregister: weakref.finalize | None = None
        pin = pin and get_accelerator().device_name() != "cpu"
        self.locked = lock and not pin and _may_lock(nbytes)
        if self.locked:
            self.data = _locked(nbytes)
            return
        self.data = _pageable(nbytes)
        self.locked = pin and _register(self.data)
        if self.locked:
            self._unregister = weakref.finalize(self, deepspeed_compat.unregister_host_memory, self.data.data_ptr())
            self._unregister.atexit = False  # the device may be gone by then, and everything goes anyway

    def close(self) -> None:
        """Unregister it; it is freed with its last view. Copies must be over. Idempotent."""
        if self._unregister is not None:
            self._unregister()
        self.data = torch.empty(0, dtype=torch.uint8)


def _register(memory: torch.Tensor) -> bool:
    try:
        return deepspeed_compat.register_host_memory(memory.data_ptr(), memory.nbytes)
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError):  # the runtime reports the same failure once more, at the next kernel
            torch.zeros(1, device=get_accelerator().current_device_name())
        logger.warning_once(f"Host memory could not be page-locked, so copies will not overlap with compute: {error}")
        return False


def _locked(nbytes: int) -> torch.Tensor:
    """Locked by DeepSpeed, whose AIO handles know it; freed with the last view."""
    assert deepspeed_compat.get_native_pinned_memory is not None  # see _may_lock
    # Zeros: what was in the heap may be the pattern by which AioIO tells that a read delivered nothing.
    return deepspeed_compat.get_native_pinned_memory().pin_empty(torch.empty(0, dtype=torch.uint8), (nbytes,)).zero_()


def _pageable(nbytes: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


def _may_lock(nbytes: int) -> bool:
    """Whether the kernel lets DeepSpeed lock that much. A trial, since DeepSpeed aborts the process if not."""
    if deepspeed_compat.get_native_pinned_memory is None:
        return False
    try:
        deepspeed_compat.get_native_pinned_memory()
        lock = ctypes.CDLL(None, use_errno=True).mlock2
    except (RuntimeError, AttributeError) as error:
        logger.info(f"Host buffers are not page-locked: {error}")
        return False
    trial = _pageable(nbytes)
    return lock(ctypes.c_void_p(trial.data_ptr()), ctypes.c_size_t(nbytes), _LOCK_ON_FAULT) == 0
