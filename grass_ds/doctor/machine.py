# SPDX-License-Identifier: Apache-2.0
"""The devices of this machine, what they compute, and its memory."""

import json
import os
import re
import resource
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
_CAP_IPC_LOCK = 14
_NO_GPU = "ask SLURM for GPUs (--gpus-per-node), look at CUDA_VISIBLE_DEVICES, install a torch built for the GPU"
_AUTO = '"{name}": {{"enabled": "auto"}} under launch/train.py or the Trainer; no such block in your own loop'


def check_accelerator() -> Iterator[Finding]:
    """The devices that training would use."""
    accelerator = get_accelerator()
    kind, count = accelerator.device_name(), accelerator.device_count()
    if kind != "cpu":
        text = ", ".join(device_text(index) for index in range(count)) or "no device"
        yield Finding("accelerator", OK if count else FAIL, f"{kind}: {text}", "" if count else _NO_GPU)
        return
    yield Finding("accelerator", OK, f"cpu, {len(os.sched_getaffinity(0))} cores for this process")
    if Path("/proc/driver/nvidia/version").exists() and os.environ.get("DS_ACCELERATOR") != "cpu":
        yield Finding("accelerator", WARN, f"NVIDIA driver, but torch {torch.__version__} sees no GPU", _NO_GPU)


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
    """Host memory, and how much of it may be page-locked."""
    memory = psutil.virtual_memory()
    text = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available"
    limit = cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    if limit is not None:
        text += f"; this job may use {limit / GIB:.1f} GiB (--mem of SLURM, or the container)"
    yield Finding("host memory", OK, text)
    capabilities = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    privileged = capabilities is not None and int(capabilities[1], 16) >> _CAP_IPC_LOCK & 1
    yield judge_memlock(resource.RLIM_INFINITY if privileged else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def judge_memlock(limit: int) -> Finding:
    """``limit``: bytes that may be page-locked, or RLIM_INFINITY."""
    if limit == resource.RLIM_INFINITY or limit >= MEMLOCK_BYTES:
        return Finding("memlock", OK, "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / GIB:.1f} GiB")
    text = f'{limit >> 10} KiB: NCCL over InfiniBand may fail, and grass.offload.io = "auto" falls back to posix'
    remedy = "ulimit -l unlimited; for SLURM PropagateResourceLimitsExcept=MEMLOCK, LimitMEMLOCK=infinity of slurmd"
    return Finding("memlock", WARN, text, remedy)


def cgroup_limit(membership: Path, root: Path) -> int | None:
    """The smallest memory limit (bytes) of the control group (version 2) and those above it; None without a limit."""
    paths = re.findall(r"^0::/(.*)$", membership.read_text(), re.MULTILINE) if membership.exists() else []
    files = [folder / "memory.max" for path in paths for folder in (root / path, *(root / path).parents)]
    limits = [file.read_text().strip() for file in files if file.exists()]
    return min((int(limit) for limit in limits if limit != "max"), default=None)
