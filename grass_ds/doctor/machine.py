# SPDX-License-Identifier: Apache-2.0
"""The devices of this machine and what they compute, its memory, and the limits that a cluster sets."""

import json
import os
import resource
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from grass_ds import precision
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding

GIB = 2**30
# The default of "host_buffers" with grass.offload.device = "nvme" takes at most this; RDMA registers about as much.
MEMLOCK_BYTES = 4 * GIB
# A rank on the CPU uses 66 MB, NCCL and data loader workers some more. Containers start with 64 MB.
SHM_BYTES = GIB
_CAP_IPC_LOCK = 14
_UNLIMITED = 2**60  # control groups of version 1 show "no limit" as a little less than 2^63
_NO_GPU = "ask SLURM for GPUs (--gpus-per-node), look at CUDA_VISIBLE_DEVICES, install a torch built for the GPU"
_AUTO = '"{name}": {{"enabled": "auto"}} under launch/train.py or the Trainer; no such block in your own loop'


def check_accelerator() -> Iterator[Finding]:
    """The devices that training would use."""
    accelerator = get_accelerator()
    kind, count = accelerator.device_name(), accelerator.device_count()
    if kind == "cpu":
        yield Finding("accelerator", OK, f"cpu, {len(os.sched_getaffinity(0))} cores for this process")
        if Path("/proc/driver/nvidia/version").exists() and os.environ.get("DS_ACCELERATOR") != "cpu":
            yield Finding("accelerator", WARN, f"NVIDIA driver, but torch {torch.__version__} sees no GPU", _NO_GPU)
    elif count == 0:
        yield Finding("accelerator", FAIL, f"{kind}, no device", _NO_GPU)
    else:
        devices = Counter(device_text(index) for index in range(count))
        yield Finding("accelerator", OK, f"{kind}: " + ", ".join(f"{n} x {text}" for text, n in devices.items()))


def device_text(index: int) -> str:
    """Name and memory of a device; "cpu" on the CPU."""
    accelerator = get_accelerator()
    kind = accelerator.device_name()
    if kind == "cpu":
        return kind
    name = getattr(torch.get_device_module(kind).get_device_properties(index), "name", kind)
    return f"{name} ({accelerator.total_memory(index) / GIB:.0f} GiB)"


def check_precision(config: str | None) -> Iterator[Finding]:
    """Time matrix products, and compare them with what the DeepSpeed config in a file asks for."""
    asked = [] if config is None else asked_for(config)
    rates, allowed = precision.measure(asked), precision.candidates()
    yield Finding("precision", OK, f"train in {rates.recommended(allowed)}: {rates.text()}")
    for name in asked:
        warning = rates.warning(name, allowed)
        if warning is None:
            yield Finding("config", OK, f"{config} asks for {name}, which this device computes")
        else:
            yield Finding("config", FAIL, f"{config}: {warning}", _AUTO.format(name=name))


def asked_for(config: str) -> list[str]:
    """The 16-bit dtypes that the DeepSpeed config in the file enables; "auto" asks for none."""
    try:
        found = json.loads(Path(config).read_text())
    except ValueError as error:
        raise ValueError(f"{config}: not valid JSON: {error}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{config}: must hold a JSON object, not a {type(found).__name__}")
    return [name for name in ("bf16", "fp16") if precision.enabled(found, name) is True]


def check_memory() -> Iterator[Finding]:
    """Host memory, how much of it may be page-locked, and shared memory."""
    memory = psutil.virtual_memory()
    text = f"{_gib(memory.total)}, {_gib(memory.available)} available"
    limit = cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if limit is not None and limit < memory.total:
        text += f"; this job may use {_gib(limit)} (--mem of SLURM, or the container)"
    yield Finding("host memory", OK, text)
    yield judge_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], _may_exceed_memlock())
    yield judge_shm(psutil.disk_usage("/dev/shm").total)


def judge_memlock(limit: int, privileged: bool) -> Finding:
    """``limit``: bytes that may be page-locked, or -1; ``privileged``: the process may exceed it."""
    if limit == resource.RLIM_INFINITY or privileged:
        return Finding("memlock", OK, "unlimited")
    if limit >= MEMLOCK_BYTES:
        return Finding("memlock", OK, _gib(limit))
    text = f'{_gib(limit)}: NCCL over InfiniBand may fail, and grass.offload.io = "auto" falls back to posix'
    remedy = "ulimit -l unlimited; for SLURM PropagateResourceLimitsExcept=MEMLOCK, LimitMEMLOCK=infinity of slurmd"
    return Finding("memlock", WARN, text, remedy)


def judge_shm(nbytes: int) -> Finding:
    """``nbytes``: size of /dev/shm."""
    if nbytes >= SHM_BYTES:
        return Finding("/dev/shm", OK, _gib(nbytes))
    return Finding("/dev/shm", WARN, f"{_gib(nbytes)} is little for ranks on one machine", "docker run --shm-size=8g")


def cgroup_limit(membership: Path, root: Path) -> int | None:
    """The smallest memory limit (bytes) of this process's control group and the groups above it; None without a limit.

    ``membership`` is /proc/self/cgroup; control groups are mounted in ``root``.
    """
    texts = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):  # version 2 or 1
            group = root / controllers / path.lstrip("/")
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            texts += [file.read_text() for folder in (group, *group.parents) if (file := folder / name).exists()]
    limits = [int(text) for text in texts if text.strip().isdecimal()]
    return min((limit for limit in limits if limit < _UNLIMITED), default=None)


def _may_exceed_memlock() -> bool:
    status = Path("/proc/self/status").read_text().splitlines()
    capabilities = next((int(line.split()[1], 16) for line in status if line.startswith("CapEff:")), 0)
    return bool(capabilities >> _CAP_IPC_LOCK & 1)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.0f} MiB"
