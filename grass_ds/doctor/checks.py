# SPDX-License-Identifier: Apache-2.0
"""The checks that need torch and DeepSpeed: first those of every rank by itself, then those of the ranks together."""

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import deepspeed.comm as dist

from grass_ds.cluster.placement import Placement, PlacementError, find, leave_process_group
from grass_ds.core.agreement import gather_from_ranks
from grass_ds.doctor import bandwidth, disks, dtypes, extensions, machine, ranks
from grass_ds.doctor.finding import FAIL, WARN, Finding, Report, examine

T = TypeVar("T")

JOIN_SECONDS, LIMIT_SECONDS = 60.0, 150.0
"""How long ranks wait for each other at first, and how long all that they do together may take."""


def check_all(report: Report, config: str | None, nvme_path: str | None, shared_path: str | None) -> None:
    """Add all findings to ``report``; the other arguments are those of the command line, or None."""
    report.findings += examine("accelerator", machine.check_accelerator)
    report.findings += examine("memory", machine.check_memory)
    report.findings += examine("extensions", extensions.check_extensions)
    report.findings += examine("build lock", extensions.check_locks, extensions.extensions_root())
    placement = None
    try:
        placement = find()
        report.rank = placement.rank
        launcher = examine("launcher", ranks.check_launcher, placement)
    except PlacementError as error:
        launcher = [Finding("launcher", FAIL, str(error))]
    report.findings += launcher
    if placement is None or placement.local_rank == 0:  # the ranks of a machine would slow each other down
        report.findings += examine("precision", dtypes.check_precision, config)
        report.findings += [] if nvme_path is None else examine("nvme_path", disks.check_nvme, nvme_path)
    if placement is None or launcher[-1].status == FAIL:
        return
    if not extensions.communication_ready():
        text = f"not joined: it would first compile {extensions.SHARED_MEMORY}, or wait for a process that does"
        # The other ranks wait for this one, in vain.
        status = FAIL if placement.world_size > 1 else WARN
        report.findings.append(Finding("process group", status, text, "start a training once, or launch/setup.sh"))
        if placement.world_size == 1 and shared_path is not None:
            report.findings += examine("shared_path", disks.check_shared, shared_path, _alone)
        return
    timer = threading.Timer(LIMIT_SECONDS, _give_up, [report, placement])
    timer.daemon = True
    timer.start()
    _check_together(report, placement, shared_path)
    timer.cancel()
    timer.join()  # or both threads would report


def _alone(task: Callable[[], T]) -> list[T]:
    """``gather_from_ranks`` of a single process without a process group."""
    return [task()]


def _check_together(report: Report, placement: Placement, shared_path: str | None) -> None:
    """Join the process group as training does, compare the ranks, and measure how fast they communicate."""
    # Otherwise the watchdog of NCCL ends the process before it can report.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    try:
        dist.init_distributed(verbose=False, timeout=timedelta(seconds=JOIN_SECONDS))
        rows = gather_from_ranks(lambda: ranks.describe(placement))
        versions = gather_from_ranks(ranks.installed_versions)
        if shared_path is not None:
            report.findings += examine("shared_path", disks.check_shared, shared_path)
        if placement.world_size > 1:
            report.findings += examine("all-reduce", bandwidth.check_all_reduce)
        report.findings = ranks.merge(gather_from_ranks(lambda: report.findings))
        report.findings += ranks.compare_versions(versions)
        report.ranks = rows
    except Exception as error:  # each communication library raises its own
        report.findings.append(ranks.no_contact(placement, f"{error}".partition("\n")[0]))
    finally:
        leave_process_group()


def _give_up(report: Report, placement: Placement) -> None:
    """Report and end the process, in a thread: the main thread cannot be interrupted in a collective."""
    report.findings.append(ranks.no_contact(placement, f"no end after {LIMIT_SECONDS:.0f} s"))
    report.write()
    os._exit(1)
