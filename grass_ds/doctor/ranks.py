# SPDX-License-Identifier: Apache-2.0
"""Where the ranks are, and what only shows when they are compared."""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deepspeed.accelerator import get_accelerator

from grass_ds.cluster.placement import Placement
from grass_ds.doctor.finding import FAIL, OK, Finding
from grass_ds.doctor.machine import device_text
from grass_ds.versions import RANGES, installed

VISIBLE = "CUDA_VISIBLE_DEVICES"


def check_launcher(placement: Placement) -> Iterator[Finding]:
    """Export the placement for the process group and select the device of this rank.

    Raises:
        PlacementError: this rank has no device.
    """
    placement.export()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if placement.launcher == "none":
        yield Finding("launcher", OK, "none: start this under srun or torchrun to check several ranks")
    else:
        address = f"{placement.master_addr}:{placement.master_port}"
        yield Finding("launcher", OK, f"{placement.launcher}: {placement.world_size} ranks, rank 0 at {address}")


def no_contact(placement: Placement, reason: str) -> Finding:
    """The ranks do not reach each other."""
    return Finding(
        "process group",
        FAIL,
        f"rank {placement.rank} of {placement.world_size} on {socket.gethostname()}, with rank 0 at "
        f"{placement.master_addr}:{placement.master_port}: {reason}",
        "look for ranks that wrote nothing or another message; check that the name of rank 0's machine resolves there, "
        "that no two ranks share a GPU (CUDA_VISIBLE_DEVICES) and that torch has NCCL; name the network interface "
        "between the machines (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME; see `ip address`); try NCCL_IB_DISABLE=1, "
        "NCCL_DEBUG=INFO",
    )


def describe(placement: Placement) -> dict[str, Any]:
    """This rank's row of the report."""
    return {
        "rank": placement.rank,
        "host": socket.gethostname(),
        "local_rank": placement.local_rank,
        "device": device_text(int(os.environ["LOCAL_RANK"])),
        VISIBLE: os.environ.get(VISIBLE, "-"),
    }


def installed_versions() -> dict[str, str]:
    """The versions that have to be the same on all ranks, by package."""
    return {name: installed(name) or "none" for name in RANGES}


def compare_versions(versions: Sequence[dict[str, str]]) -> Iterator[Finding]:
    """``versions``: of every rank, in rank order."""
    for name in versions[0]:
        found = [of_rank[name] for of_rank in versions]
        other = next((rank for rank, version in enumerate(found) if version != found[0]), None)
        if other is not None:
            text = f"{name} differs: {found[0]} on rank 0, {found[other]} on rank {other}"
            yield Finding("ranks", FAIL, text, "start all ranks from one environment on a shared filesystem")


def merge(findings: Sequence[Sequence[Finding]]) -> list[Finding]:
    """Rank 0's findings, and those that are not :data:`OK` of the first other rank that has them.

    Args:
        findings: of every rank, in rank order.
    """
    merged, known = list(findings[0]), set(findings[0])
    for rank, of_rank in enumerate(findings):
        new = [finding for finding in of_rank if finding.status != OK and finding not in known]
        merged += [replace(finding, finding=f"rank {rank}: {finding.finding}") for finding in new]
        known.update(new)
    return merged
