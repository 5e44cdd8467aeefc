# SPDX-License-Identifier: Apache-2.0
"""The devices of this machine, its memory, and the limits that a cluster puts on it."""

import os
import resource
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding
from grass_ds.doctor.rendezvous import backend_available

GIB = 2**30
# What the host buffers of grass.offload.device = "nvme" take at most by default; RDMA registers about as much.
MEMLOCK_BYTES = 4 * GIB
# A rank on the CPU takes 66 MB of it, NCCL and the workers of a data loader some more. Containers start with 64 MB.
SHM_BYTES = GIB
_CAP_IPC_LOCK = 14
_UNLIMITED = 2**60  # what version 1 of cgroups says without a limit is a little less than 2^63


def check_accelerator() -> Iterator[Finding]:
    """What training would run on."""
    accelerator = get_accelerator()
    kind, count = accelerator.device_name(), accelerator.device_count()
    if kind == "cpu":
        yield Finding("accelerator", OK, f"cpu, {len(os.sched_getaffinity(0))} cores for this process")
        if Path("/proc/driver/nvidia/version").exists() and os.environ.get("DS_ACCELERATOR") != "cpu":
            remedy = (
                "install a torch built for CUDA, ask SLURM for GPUs (--gpus-per-node), look at CUDA_VISIBLE_DEVICES"
            )
            yield Finding(
                "accelerator", WARN, f"there is an NVIDIA driver, but torch {torch.__version__} sees no GPU", remedy
            )
    elif count == 0:
        yield Finding(
            "accelerator",
            FAIL,
            f"{kind}, no device",
            "ask SLURM for GPUs (--gpus-per-node), look at CUDA_VISIBLE_DEVICES",
        )
    else:
        devices = Counter(device_text(index) for index in range(count))
        yield Finding("accelerator", OK, f"{kind}: " + ", ".join(f"{n} x {text}" for text, n in devices.items()))
    backend = accelerator.communication_backend_name()
    if backend_available(backend):
        yield Finding("backend", OK, backend)
    else:
        yield Finding(
            "backend",
            FAIL,
            f"torch {torch.__version__} is built without {backend}",
            "install the torch for this accelerator",
        )


def properties(index: int) -> Any:
    """What torch knows of the device ``index``: an object that may have ``name``, ``total_memory`` (bytes) and ``uuid``; None on the CPU."""
    kind = get_accelerator().device_name()
    return None if kind == "cpu" else torch.get_device_module(kind).get_device_properties(index)


def device_text(index: int) -> str:
    """Name and memory of a device."""
    found = properties(index)
    if found is None:
        return "cpu"
    memory = get_accelerator().total_memory(index)
    return f"{getattr(found, 'name', 'device')} ({memory / GIB:.0f} GiB)"


def check_memory() -> Iterator[Finding]:
    """Host memory, what of it may be page-locked, and shared memory."""
    memory = {
        line.split(":")[0]: 1024 * int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()
    }
    text = f"{_gib(memory['MemTotal'])}, {_gib(memory['MemAvailable'])} available"
    limit = cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if limit is not None and limit < memory["MemTotal"]:
        text += f"; this job may use {_gib(limit)} (--mem of SLURM, or the container)"
    yield Finding("host memory", OK, text)
    yield judge_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _may_exceed_memlock())
    shm = os.statvfs("/dev/shm")
    yield judge_shm(shm.f_blocks * shm.f_frsize)


def judge_memlock(limit: int, privileged: bool) -> Finding:
    """``limit``: bytes, or -1."""
    if limit == resource.RLIM_INFINITY:
        return Finding("page-locking", OK, "unlimited")
    if privileged or limit >= MEMLOCK_BYTES:
        return Finding("page-locking", OK, f"limit {_gib(limit)}" + " (does not hold for this process)" * privileged)
    return Finding(
        "page-locking",
        WARN,
        f'limit {_gib(limit)}: NCCL over InfiniBand may fail, and grass.offload.io = "auto" falls back to posix',
        "ulimit -l unlimited; in SLURM jobs PropagateResourceLimitsExcept=MEMLOCK and LimitMEMLOCK=infinity of slurmd",
    )


def judge_shm(nbytes: int) -> Finding:
    """``nbytes``: size of /dev/shm."""
    if nbytes >= SHM_BYTES:
        return Finding("/dev/shm", OK, _gib(nbytes))
    return Finding("/dev/shm", WARN, f"{_gib(nbytes)} is little for ranks on one machine", "docker run --shm-size=8g")


def cgroup_limit(membership: Path, root: Path) -> int | None:
    """The smallest memory limit (bytes) on the way to this process, None if there is none.

    Args:
        membership: /proc/self/cgroup.
        root: where the control groups are mounted.
    """
    limits = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container the way may begin outside of what is mounted
            file = folder / name
            if folder.is_relative_to(base) and file.exists() and (text := file.read_text().strip()).isdecimal():
                limits.append(int(text))
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def _may_exceed_memlock() -> bool:
    status = Path("/proc/self/status").read_text().splitlines()
    capabilities = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    return bool(capabilities >> _CAP_IPC_LOCK & 1)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.0f} MiB"
