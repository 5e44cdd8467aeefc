# SPDX-License-Identifier: Apache-2.0
"""The speed of all-reduce, in the terms of nccl-tests.

Algorithm bandwidth is bytes per second. Bus bandwidth is that times 2 (n - 1) / n for n ranks, which is what each rank
sends in a ring: it can be compared with the hardware, whatever the number of ranks.
"""

import time
from collections.abc import Iterator

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.doctor.finding import FAIL, OK, Finding

SIZES = (8, 2**20, 2**24)
"""Bytes."""
ROUNDS = 10


def check_all_reduce() -> Iterator[Finding]:
    """Check the sum of one all-reduce, then time each of :data:`SIZES`. Called on all ranks of the process group."""
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
