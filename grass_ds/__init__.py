# SPDX-License-Identifier: Apache-2.0
"""Layer-sampled full-parameter fine-tuning under DeepSpeed ZeRO (after GRASS, arXiv 2604.07808)."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.entry import enable, initialize
from grass_ds.resume import last_checkpoint
from grass_ds.runtime.engine import GrassEngine

if TYPE_CHECKING:
    from grass_ds.hf import GrassCallback

try:
    __version__ = version("grass_ds")
except PackageNotFoundError:  # used from a source tree
    __version__ = "0+source"

__all__ = [
    "GrassCallback",
    "GrassConfig",
    "GrassConfigError",
    "GrassEngine",
    "enable",
    "initialize",
    "last_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name == "GrassCallback":  # needs transformers, which an own loop need not have
        from grass_ds.hf import GrassCallback

        return GrassCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
