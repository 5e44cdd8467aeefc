# SPDX-License-Identifier: Apache-2.0
"""The checks that need torch and DeepSpeed: first those of every rank by itself, then those of the ranks together."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.cluster.channel import Channel, bound_socket
from grass_ds.cluster.heartbeat import Heartbeat
from grass_ds.cluster.placement import Placement, find, leave_process_group
from grass_ds.core.agreement import gather_from_ranks
from grass_ds.doctor import disks, extensions, machine
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding, Report, examine
from grass_ds.doctor.fitting import check_plan
from grass_ds.versions import RANGES

JOIN_SECONDS, LIMIT_SECONDS = 60.0, 150.0
"""How long ranks wait for each other at first, and how long all that they do together may take."""
SIZES = (8, 2**20, 2**24)
"""Bytes of the all-reduces that are timed."""
ROUNDS = 10


def check_all(
    report: Report,
    config: str | None,
    nvme_path: str | None,
    shared_path: str | None,
    needs: Mapping[str, Any] | None = None,
) -> None:
    """Add all findings to ``report``; the other arguments are those of the command line, or None.

    ``needs``: what a plan needs of the machine.
    """
    report.findings += examine("accelerator", machine.check_accelerator)
    report.findings += examine("memory", machine.check_memory)
    report.findings += examine("extensions", extensions.check_extensions)
    report.findings += examine("build lock", extensions.check_locks)
    report.findings += examine("launcher", check_launcher, report)
    placement = None if report.findings[-1].status == FAIL else find()
    if placement is None or placement.local_rank == 0:  # the ranks of a machine would slow each other down
        report.findings += examine("precision", machine.check_precision, config)
        report.findings += [] if nvme_path is None else examine("nvme_path", disks.check_nvme, nvme_path)
        report.findings += [] if needs is None else examine("plan", check_plan, needs)
    if placement is not None and extensions.communication_ready():
        _check_together(report, placement, shared_path)
    elif placement is not None:
        text = f"not joined: it would first compile {extensions.SHARED_MEMORY}, or wait for a process that does"
        text += "" if shared_path is None else "; so the shared folder is not checked"
        status = FAIL if placement.world_size > 1 else WARN  # the other ranks wait for this one, in vain
        remedy = "start a training once, or launch/setup.sh"
        report.findings.append(Finding("process group", status, text, remedy))


def check_launcher(report: Report) -> Iterator[Finding]:
    """Set the rank of ``report``, export the placement for the process group and select the device of this rank."""
    placement = find()
    report.rank = placement.rank
    placement.export()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    text = f"{placement.world_size} ranks, rank 0 at {placement.master_addr}:{placement.master_port}"
    alone = "start this under srun or torchrun to check several ranks"
    yield Finding("launcher", OK, f"{placement.launcher}: {alone if placement.launcher == 'none' else text}")


def _check_together(report: Report, placement: Placement, shared_path: str | None) -> None:
    """Join the process group as training does, compare the ranks, and measure how fast they communicate."""
    heartbeat = Heartbeat(limit=10 * LIMIT_SECONDS, interval=1.0)  # tells rank 0 who is there, long before that limit
    rank, address = placement.rank, (placement.master_addr, placement.master_port)

    def fail(reason: str) -> None:
        report.findings.append(_no_contact(placement, reason, heartbeat.never_heard()))

    def give_up() -> None:  # in a thread: the main thread cannot be interrupted in a collective
        fail(f"no end after {LIMIT_SECONDS:.0f} s")
        report.write()
        os._exit(1)

    timer = threading.Timer(LIMIT_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    # Otherwise the watchdog of NCCL ends the process before it can report.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    try:
        with contextlib.suppress(OSError):
            own = bound_socket(address[1]) if rank == 0 else None  # where the ranks meet: UDP has ports of its own
            heartbeat.start(Channel(rank, placement.world_size, address, "grass_ds doctor", own))
        dist.init_distributed(verbose=False, timeout=timedelta(seconds=JOIN_SECONDS))
        rows = gather_from_ranks(lambda: _describe(placement))
        if shared_path is not None:
            report.findings += examine("shared_path", disks.check_shared, shared_path)
        if placement.world_size > 1:
            report.findings += examine("all-reduce", check_all_reduce)
        report.findings = merge(gather_from_ranks(lambda: report.findings))
        report.ranks = rows
    except Exception as error:  # each communication library raises its own
        # NCCL says in the last of its lines that two ranks share a GPU.
        fail(" ".join(f"{error}".partition("Exception raised from")[0].split()))
    finally:
        heartbeat.stop()
        leave_process_group()
        timer.cancel()
        timer.join()  # or both threads would report


def _no_contact(placement: Placement, reason: str, never_heard: Sequence[int]) -> Finding:
    """The ranks do not reach each other; ``never_heard``: those that gave this one no sign of life."""
    unheard = f"; nothing heard of rank {', '.join(map(str, never_heard))}" if never_heard else ""
    return Finding(
        "process group",
        FAIL,
        f"rank {placement.rank} of {placement.world_size} on {socket.gethostname()}, with rank 0 at "
        f"{placement.master_addr}:{placement.master_port}: {reason}{unheard}",
        "look for ranks that wrote nothing or another message; check that the name of rank 0's machine resolves there, "
        "that no two ranks share a GPU (CUDA_VISIBLE_DEVICES) and that torch has NCCL; name the network interface "
        "between the machines (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; see `ip address`); try NCCL_IB_DISABLE=1, "
        "NCCL_DEBUG=INFO",
    )


def _describe(placement: Placement) -> dict[str, Any]:
    """This rank's row of the report."""
    return {
        "rank": placement.rank,
        "host": socket.gethostname(),
        "local_rank": placement.local_rank,
        "device": machine.device_text(int(os.environ["LOCAL_RANK"])),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "-"),
    }


def merge(findings: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Rank 0's findings, then those of the others that are not OK, or of another version; ``findings`` by rank."""
    merged, known = list(findings[0]), set(findings[0])
    for rank, of_rank in enumerate(findings):
        for finding in of_rank:
            text = f"rank {rank}: {finding.finding}"
            if finding not in known and finding.check in RANGES:
                remedy = "start all ranks from one environment on a shared filesystem"
                merged.append(Finding(finding.check, FAIL, f"{text}, not as on rank 0", remedy))
            elif finding not in known and finding.status != OK:
                merged.append(replace(finding, finding=text))
        known.update(of_rank)
    return merged


def check_all_reduce() -> Iterator[Finding]:
    """Time an all-reduce of each of :data:`SIZES`, in the terms of nccl-tests.

    Algorithm bandwidth is bytes per second. Bus bandwidth is that times 2 (n - 1) / n for n ranks, which is what each
    rank sends in a ring: it can be compared with the hardware.
    """
    world, device = dist.get_world_size(), get_accelerator().current_device_name()
    for nbytes in SIZES:
        tensor = torch.zeros(nbytes // 4, device=device)
        dist.all_reduce(tensor)  # the first one also connects the ranks
        dist.barrier()
        get_accelerator().synchronize()
        start = time.perf_counter()
        for _ in range(ROUNDS):
            dist.all_reduce(tensor)
        get_accelerator().synchronize()
        seconds = (time.perf_counter() - start) / ROUNDS
        algorithm = nbytes / seconds / 1e9
        bus = algorithm * 2 * (world - 1) / world
        text = f"{nbytes} bytes: {1e6 * seconds:.0f} us, {algorithm:.3g} GB/s algorithm, {bus:.3g} GB/s bus"
        yield Finding("all-reduce", OK, text)
