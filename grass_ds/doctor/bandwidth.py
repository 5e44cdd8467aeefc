# SPDX-License-Identifier: Apache-2.0
"""How fast the ranks' all-reduce is, in the terms of nccl-tests.

Algorithm bandwidth is bytes per time. Bus bandwidth is that times 2 (n - 1) / n for n ranks, what each sends in a ring: it is to be compared
with the hardware, whatever the number of ranks.
"""

import time
from collections.abc import Iterator
from datetime import timedelta

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.cluster.placement import leave
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding

SECONDS = 60.0
"""How long all of it may take. Time-outs of the process group come later: NCCL's end the process without a word on stdout."""
HANGS = Finding(
    "all-reduce",
    FAIL,
    f"no end after {SECONDS:.0f} s: the machines cannot reach each other on the interface that is used",
    "name the right one (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); NCCL_DEBUG=INFO tells what it tries; try NCCL_IB_DISABLE=1",
)
SMALL_BYTES, LATENCY_ROUNDS = 8, 20
ROUNDS = 5
SLOW_GBPS = 1.0


def check_all_reduce() -> Iterator[Finding]:
    """Join the process group, time its all-reduce, and leave it again. May hang: see :data:`SECONDS`."""
    try:
        dist.init_distributed(verbose=False, timeout=timedelta(seconds=2 * SECONDS))
        yield from _measure()
    finally:
        leave()


def _measure() -> Iterator[Finding]:
    world, cpu = dist.get_world_size(), get_accelerator().device_name() == "cpu"
    ones = torch.ones(SMALL_BYTES // 4, device=get_accelerator().current_device_name())
    dist.all_reduce(ones)
    if not (ones == world).all():
        yield Finding(
            "all-reduce",
            FAIL,
            f"the sum of a one from each of {world} ranks is {ones.tolist()}",
            "set NCCL_P2P_DISABLE=1, then look for broken links",
        )
        return
    yield Finding("all-reduce", OK, f"{SMALL_BYTES} bytes: {1e6 * _seconds(SMALL_BYTES, LATENCY_ROUNDS):.0f} us")
    for mebibytes in (1, 16 if cpu else 64):
        nbytes = mebibytes * 2**20
        seconds = _seconds(nbytes, ROUNDS)
        algorithm = nbytes / seconds / 1e9
        bus = algorithm * 2 * (world - 1) / world
        slow = mebibytes > 1 and not cpu and bus < SLOW_GBPS
        yield Finding(
            "all-reduce",
            WARN if slow else OK,
            f"{mebibytes} MiB: {1e3 * seconds:.2f} ms, {algorithm:.2f} GB/s algorithm, {bus:.2f} GB/s bus",
            "NCCL_DEBUG=INFO tells what it uses; name the fast interface in NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
            if slow
            else "",
        )


def _seconds(nbytes: int, rounds: int) -> float:
    """Of one all-reduce, the mean of ``rounds``."""
    accelerator = get_accelerator()
    tensor = torch.zeros(nbytes // 4, device=accelerator.current_device_name())
    dist.all_reduce(tensor)
    dist.barrier()
    accelerator.synchronize()
    start = time.perf_counter()
    for _ in range(rounds):
        dist.all_reduce(tensor)
    accelerator.synchronize()
    return (time.perf_counter() - start) / rounds
