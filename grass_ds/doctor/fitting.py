# SPDX-License-Identifier: Apache-2.0
"""Whether this machine has what a plan needs."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from deepspeed.accelerator import get_accelerator

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding
from grass_ds.doctor.machine import cgroup_limit
from grass_ds.offload.state_files import resolve_path

_DEVICE = (
    "plan for less: --checkpointing, a smaller --micro_batch, --gamma or --sequence, --stage 3 on several devices"
)
_HOST = "plan for less: --state_format 8bit takes a third; --nvme moves the state to a local disk"
_DISK = "name another folder by --nvme_path, or plan for less: --state_format 8bit takes a third"


def check_plan(needs: Mapping[str, Any]) -> Iterator[Finding]:
    """Compare the devices, the host memory and the disk of this machine with ``needs`` of a plan."""
    accelerator, ranks = get_accelerator(), needs["ranks"]
    device, host = needs["device_bytes"], needs["host_bytes"]
    if accelerator.device_name() == "cpu":  # one memory for both
        device, host = 0, host + ranks * device
    else:
        yield _judge("device memory", device, accelerator.total_memory(), _DEVICE)
        count = accelerator.device_count()
        if count < ranks:
            text = f"devices: {ranks} are planned, this machine has {count}"
            yield Finding("plan", WARN, text, "plan for those that are here, or start ranks on several machines")
    yield _judge("host memory", host, available_memory(), _HOST)
    if needs["disk_bytes"]:
        path = resolve_path(needs["nvme_path"])
        yield _judge(f"disk at {path}", needs["disk_bytes"], shutil.disk_usage(path).free, _DISK)


def available_memory() -> int:
    """Bytes of host memory that a job can get here: what is free, and no more than the limit of this job."""
    limit = cgroup_limit(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    available = psutil.virtual_memory().available
    return available if limit is None else min(limit, available)


def _judge(what: str, needed: int, found: int, remedy: str) -> Finding:
    text = f"{what}: {needed / 1e9:.2f} GB are planned, {found / 1e9:.2f} GB are here"
    return Finding("plan", OK, text) if needed <= found else Finding("plan", FAIL, text, remedy)
