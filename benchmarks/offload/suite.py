# SPDX-License-Identifier: Apache-2.0
"""Suite ``offload``: every "offload" block in interleaved rounds."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from benchmarks.case import Case, Request

BASE = "none"  # state on the device: what the others are compared with
# No transfer before the step that needs it, and one chunk at a time.
_SERIAL = {"prefetch": "step", "device_buffers": 1}
# Otherwise a chunk is a whole shard of a layer of SmolLM2-135M, and a few buffers hold all that trains.
_SMALL = {"chunk_numel": 262_144}
# name -> block; whoever runs an "nvme" block adds its path.
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {"device": "none"},
    "cpu-stream": {"device": "cpu", "residency": "stream"},
    "cpu-stream-serial": {"device": "cpu", "residency": "stream", **_SERIAL},
    "cpu-stream-chunks": {"device": "cpu", "residency": "stream", **_SMALL},
    "cpu-period": {"device": "cpu", "residency": "period"},
    "cpu-period-serial": {"device": "cpu", "residency": "period", **_SERIAL},
    "nvme-stream": {"device": "nvme", "residency": "stream"},
    "nvme-stream-serial": {"device": "nvme", "residency": "stream", "host_buffers": 3, **_SERIAL},
    "nvme-stream-files": {"device": "nvme", "residency": "stream", "host_buffers": 4, **_SMALL},
    "nvme-stream-files-serial": {"device": "nvme", "residency": "stream", "host_buffers": 3, **_SMALL, **_SERIAL},
    "nvme-period": {"device": "nvme", "residency": "period"},
    "nvme-period-serial": {"device": "nvme", "residency": "period", "host_buffers": 3, **_SERIAL},
}


def cases(request: Request) -> Iterator[Case]:
    """One seed per round, so that all variants step the same layers: ``uniform`` draws by nothing but the seed.

    One draw in five steps is five times as many as by default: draws are what ``period`` pays for.
    """
    base = Case(kind="cost", method="uniform", ranks=2, warmup=5, steps=25, prepare_state=True)
    for seed, offload in product(range(request.rounds), OFFLOADS):
        yield replace(base, offload=offload, seed=seed, grass={"sample_period": 5})
