# SPDX-License-Identifier: Apache-2.0
"""Where the ranks are, and what only shows when they are compared."""

import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from deepspeed.accelerator import get_accelerator

from grass_ds.cluster.placement import Placement
from grass_ds.doctor.extensions import SHARED_MEMORY
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding
from grass_ds.doctor.machine import device_text, properties
from grass_ds.doctor.software import installed_versions

VISIBLE = "CUDA_VISIBLE_DEVICES"
NEEDED_TO_TALK = ("accelerator", "backend", "launcher", "ranks")


def check_placement(place: Placement) -> Iterator[Finding]:
    """What the launcher says, as far as one rank can tell. Exports it for the process group, see :meth:`Placement.export`."""
    if place.launcher == "none":
        yield Finding(
            "launcher", OK, "none: one process; start this under srun or torchrun to check the ranks together"
        )
        return
    place.export()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    yield Finding(
        "launcher",
        OK,
        f"{place.launcher}: {place.world_size} ranks, rank 0 at {place.master_addr}:{place.master_port}",
    )
    try:
        socket.getaddrinfo(place.master_addr, place.master_port)
    except OSError as error:
        remedy = (
            "set MASTER_ADDR to a name or address of the first machine that all others know (scontrol show hostnames)"
        )
        yield Finding("launcher", FAIL, f"MASTER_ADDR={place.master_addr} leads nowhere: {error}", remedy)


def facts(place: Placement) -> dict[str, Any]:
    """What the others are to know of this rank."""
    host, index = socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0"))
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    device, uuid = _device(index)
    return {
        "rank": place.rank,
        "host": host,
        "local_rank": place.local_rank,
        "device": device,
        VISIBLE: os.environ.get(VISIBLE, "-"),
        "uuid": uuid,
        "address": address,
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "versions": installed_versions(),
    }


def row(known: Mapping[str, Any]) -> dict[str, Any]:
    """The part of :func:`facts` that is shown."""
    return {key: known[key] for key in ("rank", "host", "local_rank", "device", VISIBLE)}


def compare(known: Mapping[int, Mapping[str, Any]], world_size: int) -> Iterator[Finding]:
    """Findings about the ranks together; ``known``: rank -> its :func:`facts`."""
    missing = [rank for rank in range(world_size) if rank not in known]
    if missing:
        yield Finding(
            "ranks", FAIL, f"no answer from {_ranks(missing)} of {world_size}", "look at the messages of those ranks"
        )
    devices: dict[tuple[str, str], list[int]] = {}
    for rank, fact in known.items():
        if fact["uuid"] is not None:
            devices.setdefault((fact["host"], fact["uuid"]), []).append(rank)
    for (host, _), sharing in devices.items():
        if len(sharing) > 1:
            remedy = "start at most as many ranks as there are GPUs, and show every rank its own or all of them"
            yield Finding(
                "ranks", FAIL, f"{_ranks(sharing)} share one GPU of {host} ({known[sharing[0]]['device']})", remedy
            )
    yield from _compare_versions(known)
    hosts = sorted({fact["host"] for fact in known.values()})
    loopback = sorted({f["host"] for f in known.values() if f["address"].startswith("127.") and not f["interface"]})
    if len(hosts) > 1 and loopback:
        remedy = (
            "export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (the interface between the machines, see `ip address`)"
        )
        yield Finding(
            "ranks", WARN, f"{', '.join(loopback)}: the own name means 127.x there, where the others are not", remedy
        )
    if not missing:
        yield Finding("ranks", OK, f"{world_size} on {len(hosts)} machine" + "s" * (len(hosts) > 1))


def merge(heard: Mapping[int, list[dict[str, str]]]) -> list[Finding]:
    """Rank 0's findings, and of the other ranks' those that are not :data:`OK` and that it does not have itself."""
    findings = [Finding(**finding) for finding in heard.get(0, [])]
    others: dict[Finding, list[int]] = {}
    for rank, said in heard.items():
        for finding in (Finding(**finding) for finding in said):
            if rank and finding.status != OK and finding not in findings:
                others.setdefault(finding, []).append(rank)
    return findings + [
        Finding(**{**asdict(f), "finding": f"{_ranks(ranks)}: {f.finding}"}) for f, ranks in others.items()
    ]


def obstacle(findings: Iterable[Finding], ready: Iterable[bool]) -> str:
    """Why the ranks cannot talk to each other now (``ready``: whether each could join a process group at once); empty if they can."""
    if any(finding.status == FAIL and finding.check in NEEDED_TO_TALK for finding in findings):
        return "first mend what is wrong above"
    if not all(ready):
        return f"it would first compile {SHARED_MEMORY}, or wait for another process that does; start a training once, or launch/setup.sh"
    return ""


def _device(index: int) -> tuple[str, str | None]:
    """What the device is called, and what tells it from all others on this machine; None on the CPU, and without a device."""
    try:
        found = properties(index)
        # Two tasks may each see one device, which both call number 0.
        uuid = None if found is None else str(getattr(found, "uuid", "") or f"{os.environ.get(VISIBLE)} {index}")
        return ("cpu" if found is None else f"{index}: {device_text(index)}"), uuid
    except (RuntimeError, AssertionError):  # no such device: check_placement() says so
        return "-", None


def _compare_versions(known: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    names = {name for fact in known.values() for name in fact["versions"]}
    for name in sorted(names):
        having: dict[str, list[int]] = {}
        for rank, fact in known.items():
            having.setdefault(fact["versions"][name], []).append(rank)
        if len(having) > 1:
            text = ", ".join(f"{version} on {_ranks(ranks)}" for version, ranks in having.items())
            yield Finding(
                "ranks", FAIL, f"{name} differs: {text}", "start all ranks from one environment on a shared filesystem"
            )


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"
