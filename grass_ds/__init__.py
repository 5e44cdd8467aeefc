# SPDX-License-Identifier: Apache-2.0
"""Layer-sampled full-parameter fine-tuning under DeepSpeed ZeRO (after GRASS, arXiv 2604.07808)."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.entry import enable, initialize
from grass_ds.heartbeat import RANK_LOST, Heartbeat
from grass_ds.placement import Placement, PlacementError
from grass_ds.preemption import PREEMPTED, Preemption
from grass_ds.resume import last_checkpoint
from grass_ds.runtime.engine import GrassEngine

if TYPE_CHECKING:
    from grass_ds.hf import GrassCallback, PreemptionCallback

try:
    __version__ = version("grass_ds")
except PackageNotFoundError:  # used from a source tree
    __version__ = "0+source"

__all__ = [
    "PREEMPTED",
    "RANK_LOST",
    "GrassCallback",
    "GrassConfig",
    "GrassConfigError",
    "GrassEngine",
    "Heartbeat",
    "Placement",
    "PlacementError",
    "Preemption",
    "PreemptionCallback",
    "enable",
    "initialize",
    "last_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name in ("GrassCallback", "PreemptionCallback"):  # they need transformers, which an own loop need not have
        from grass_ds import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
