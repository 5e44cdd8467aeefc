# SPDX-License-Identifier: Apache-2.0
"""What a process uses: memory, bytes through the disk."""

from contextlib import suppress
from pathlib import Path

from deepspeed.accelerator import get_accelerator


def peak_bytes() -> int:
    """Largest memory so far: the device's allocator on a GPU, resident memory of the process on the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return accelerator.max_memory_allocated()
    return process_bytes("VmHWM")


def process_bytes(field: str) -> int:
    """Resident memory of this process: ``VmRSS`` now, ``VmHWM`` at its largest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def disk_bytes() -> dict[str, int]:
    """Bytes that this process, all threads, has read from and written to disks so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(counters["read_bytes"]), "written": int(counters["write_bytes"])}


def reset_peak() -> None:
    """Let :func:`peak_bytes` count from now on, where the operating system allows it."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
