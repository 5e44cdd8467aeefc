"""The peak of a rank's memory while it trains: of the accelerator, or of the process where the CPU is the device."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator

from launch import distributed

_PROC_STATUS = Path("/proc/self/status")
_PROC_CLEAR = Path("/proc/self/clear_refs")


def reset() -> None:
    """Start a new peak: of the accelerator's memory, or of this process's resident memory on the CPU."""
    if get_accelerator().device_name() != "cpu":
        get_accelerator().reset_peak_memory_stats()
        return
    # Where this is not Linux, or not permitted, the peak is that of the whole run.
    with contextlib.suppress(OSError):
        _PROC_CLEAR.write_text("5")


def own() -> int:
    """This rank's peak in bytes since `reset`."""
    if get_accelerator().device_name() != "cpu":
        return int(get_accelerator().max_memory_allocated())
    return _peak_resident()


def over_ranks(own: int) -> dict[str, Any]:
    """The largest rank's peak in bytes, and what was measured.

    Args:
        own: this rank's, see `own`.
    """
    on_device = get_accelerator().device_name() != "cpu"
    what = "allocated on the device" if on_device else "resident in the process (RSS)"
    return {"bytes": int(distributed.max_over_ranks(own)), "what": what}


def _peak_resident() -> int:
    if _PROC_STATUS.is_file():
        for line in _PROC_STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
