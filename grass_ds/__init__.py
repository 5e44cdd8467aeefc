# SPDX-License-Identifier: Apache-2.0
"""Layer-sampled full-parameter fine-tuning under DeepSpeed ZeRO (after GRASS, arXiv 2604.07808).

Names are imported at their first use: an own loop does not need transformers, and ``python -m grass_ds doctor`` runs
where torch or DeepSpeed does not load.
"""

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grass_ds.cluster.heartbeat import RANK_LOST, Heartbeat
    from grass_ds.cluster.placement import PlacementError
    from grass_ds.cluster.preemption import PREEMPTED, Preemption
    from grass_ds.config import GrassConfig, GrassConfigError
    from grass_ds.entry import enable, initialize
    from grass_ds.trainer.callback import GrassCallback, attach
    from grass_ds.trainer.checkpoints import last_checkpoint
    from grass_ds.trainer.preemption_callback import PreemptionCallback
    from grass_ds.zero.engine import GrassEngine

try:
    __version__ = version("grass_ds")
except PackageNotFoundError:  # used from a source tree
    __version__ = "0+source"

_MODULES = {
    "PREEMPTED": "cluster.preemption",
    "RANK_LOST": "cluster.heartbeat",
    "GrassCallback": "trainer.callback",
    "GrassConfig": "config",
    "GrassConfigError": "config",
    "GrassEngine": "zero.engine",
    "Heartbeat": "cluster.heartbeat",
    "PlacementError": "cluster.placement",
    "Preemption": "cluster.preemption",
    "PreemptionCallback": "trainer.preemption_callback",
    "attach": "trainer.callback",
    "enable": "entry",
    "initialize": "entry",
    "last_checkpoint": "trainer.checkpoints",
}

__all__ = [
    "PREEMPTED",
    "RANK_LOST",
    "GrassCallback",
    "GrassConfig",
    "GrassConfigError",
    "GrassEngine",
    "Heartbeat",
    "PlacementError",
    "Preemption",
    "PreemptionCallback",
    "attach",
    "enable",
    "initialize",
    "last_checkpoint",
]


# Modules that moved: their old names keep working for one release.
_MOVED = {"placement": "cluster.placement"}


def _module(name: str) -> ModuleType:
    """Import a module. The error names a missing extra, or the packages outside of their tested range."""
    from grass_ds.versions import EXTRAS, RANGES, remedy, untested

    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:  # transformers 4 makes a RuntimeError of every failed import
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            command = remedy(error.name) if error.name in RANGES else f"pip install {error.name}"
            raise ImportError(f"{error}: {command} (extra {EXTRAS[error.name]!r} of grass_ds)") from error
        sentence = untested(package for package in RANGES if f"pip install '{package}" not in str(error))
        if not sentence:
            raise
        raise ImportError(f"{error}. It may be why: {sentence}") from error


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(_module(f"grass_ds.{_MODULES[name]}"), name)
    if name in _MOVED:
        path = f"grass_ds.{_MOVED[name]}"
        warnings.warn(f"grass_ds.{name} is now {path}", DeprecationWarning, stacklevel=2)
        return _module(path)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
