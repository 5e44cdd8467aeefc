# SPDX-License-Identifier: Apache-2.0
"""The checks that need torch and DeepSpeed: first those of every rank by itself, then those of the ranks together."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.cluster.channel import Channel, bound_socket
from grass_ds.cluster.heartbeat import Heartbeat
from grass_ds.cluster.placement import Placement, find, leave_process_group
from grass_ds.core.agreement import gather_from_ranks
from grass_ds.doctor import disks, extensions, machine
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding, Report, examine
from grass_ds.versions import RANGES, installed

T = TypeVar("T")

JOIN_SECONDS, LIMIT_SECONDS = 60.0, 150.0
"""How long ranks wait for each other at first, and how long all that they do together may take."""
SIZES = (8, 2**20, 2**24)
"""Bytes of the all-reduces that are timed."""
ROUNDS = 10


def check_all(report: Report, config: str | None, nvme_path: str | None, shared_path: str | None) -> None:
    """Add all findings to ``report``; the other arguments are those of the command line, or None."""
    report.findings += examine("accelerator", machine.check_accelerator)
    report.findings += examine("memory", machine.check_memory)
    report.findings += examine("extensions", extensions.check_extensions)
    report.findings += examine("build lock", extensions.check_locks)
    report.findings += examine("launcher", check_launcher, report)
    placed = report.findings[-1].status != FAIL
    if not placed or find().local_rank == 0:  # the ranks of a machine would slow each other down
        report.findings += examine("precision", machine.check_precision, config)
        report.findings += [] if nvme_path is None else examine("nvme_path", disks.check_nvme, nvme_path)
    if not placed:
        return
    placement = find()
    if extensions.communication_ready():
        _check_together(report, placement, shared_path)
        return
    text = f"not joined: it would first compile {extensions.SHARED_MEMORY}, or wait for a process that does"
    # The other ranks wait for this one, in vain.
    status = FAIL if placement.world_size > 1 else WARN
    report.findings.append(Finding("process group", status, text, "start a training once, or launch/setup.sh"))
    if placement.world_size == 1 and shared_path is not None:
        report.findings += examine("shared_path", disks.check_shared, shared_path, _alone)


def _alone(task: Callable[[], T]) -> list[T]:
    """``gather_from_ranks`` of a single process without a process group."""
    return [task()]


def check_launcher(report: Report) -> Iterator[Finding]:
    """Set the rank of ``report``, export the placement for the process group and select the device of this rank.

    Raises:
        PlacementError: launchers contradict each other, or this rank has no device.
    """
    placement = find()
    report.rank = placement.rank
    placement.export()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if placement.launcher == "none":
        yield Finding("launcher", OK, "none: start this under srun or torchrun to check several ranks")
    else:
        address = f"{placement.master_addr}:{placement.master_port}"
        yield Finding("launcher", OK, f"{placement.launcher}: {placement.world_size} ranks, rank 0 at {address}")


def _check_together(report: Report, placement: Placement, shared_path: str | None) -> None:
    """Join the process group as training does, compare the ranks, and measure how fast they communicate."""
    heartbeat = Heartbeat(limit=10 * LIMIT_SECONDS, interval=1.0)  # tells rank 0 who is there, long before that limit

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
            heartbeat.start(_channel(placement))
        dist.init_distributed(verbose=False, timeout=timedelta(seconds=JOIN_SECONDS))
        rows = gather_from_ranks(lambda: _describe(placement))
        versions = gather_from_ranks(lambda: {name: installed(name) or "none" for name in RANGES})
        if shared_path is not None:
            report.findings += examine("shared_path", disks.check_shared, shared_path)
        if placement.world_size > 1:
            report.findings += examine("all-reduce", check_all_reduce)
        report.findings = merge(gather_from_ranks(lambda: report.findings))
        report.findings += compare_versions(versions)
        report.ranks = rows
    except Exception as error:  # each communication library raises its own
        # NCCL says in the last of its lines that two ranks share a GPU.
        fail(" ".join(f"{error}".partition("Exception raised from")[0].split()))
    finally:
        heartbeat.stop()
        leave_process_group()
        timer.cancel()
        timer.join()  # or both threads would report


def _channel(placement: Placement) -> Channel:
    """Datagrams to the port of rank 0 at which the ranks meet: UDP has ports of its own."""
    address = placement.master_addr, placement.master_port
    own = bound_socket(placement.master_port) if placement.rank == 0 else None
    return Channel(placement.rank, placement.world_size, address, "grass_ds doctor", own)


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


def compare_versions(versions: Sequence[dict[str, str]]) -> Iterator[Finding]:
    """``versions``: of every rank, in rank order, by package."""
    for name, first in versions[0].items():
        other = next((rank for rank, of_rank in enumerate(versions) if of_rank[name] != first), None)
        if other is not None:
            text = f"{name} differs: {first} on rank 0, {versions[other][name]} on rank {other}"
            yield Finding("ranks", FAIL, text, "start all ranks from one environment on a shared filesystem")


def merge(findings: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Rank 0's findings, and those of other ranks that are not OK; ``findings``: of every rank, in rank order."""
    merged, known = list(findings[0]), set(findings[0])
    for rank, of_rank in enumerate(findings):
        new = [finding for finding in of_rank if finding.status != OK and finding not in known]
        merged += [replace(finding, finding=f"rank {rank}: {finding.finding}") for finding in new]
        known.update(new)
    return merged


def check_all_reduce() -> Iterator[Finding]:
    """Check the sum of one all-reduce, then time each of :data:`SIZES`, in the terms of nccl-tests.

    Algorithm bandwidth is bytes per second. Bus bandwidth is that times 2 (n - 1) / n for n ranks, which is what each
    rank sends in a ring: it can be compared with the hardware.
    """
    world, device = dist.get_world_size(), get_accelerator().current_device_name()
    total = torch.ones(2, device=device)
    dist.all_reduce(total)
    if total.tolist() != [world, world]:
        text = f"the sum of a one from each of {world} ranks is {total.tolist()}"
        yield Finding("all-reduce", FAIL, text, "set NCCL_P2P_DISABLE=1, then look for broken links")
        return
    for nbytes in SIZES:
        seconds = _seconds(torch.zeros(nbytes // 4, device=device))
        algorithm = nbytes / seconds / 1e9
        bus = algorithm * 2 * (world - 1) / world
        text = f"{nbytes} bytes: {1e6 * seconds:.0f} us, {algorithm:.3g} GB/s algorithm, {bus:.3g} GB/s bus"
        yield Finding("all-reduce", OK, text)


def _seconds(tensor: torch.Tensor) -> float:
    """Mean time of one all-reduce."""
    dist.all_reduce(tensor)
    dist.barrier()
    get_accelerator().synchronize()
    start = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor)
    get_accelerator().synchronize()
    return (time.perf_counter() - start) / ROUNDS
