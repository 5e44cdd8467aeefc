# SPDX-License-Identifier: Apache-2.0
"""Layer-sampled full-parameter fine-tuning under DeepSpeed ZeRO (after GRASS, arXiv 2604.07808).

Names are imported at their first use: an own loop does not need transformers, and ``python -m grass_ds doctor`` runs
where torch or DeepSpeed does not load.
"""

import warnings
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from grass_ds import versions

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

__all__ = ["PREEMPTED", "RANK_LOST", "GrassCallback", "GrassConfig", "GrassConfigError", "GrassEngine", "Heartbeat"]
__all__ += ["PlacementError", "Preemption", "PreemptionCallback", "attach", "enable", "initialize", "last_checkpoint"]
__version__ = versions.installed("grass_ds") or "0+source"

_NAMES = {
    "cluster.heartbeat": ("RANK_LOST", "Heartbeat"),
    "cluster.placement": ("PlacementError",),
    "cluster.preemption": ("PREEMPTED", "Preemption"),
    "config": ("GrassConfig", "GrassConfigError"),
    "entry": ("enable", "initialize"),
    "trainer.callback": ("GrassCallback", "attach"),
    "trainer.checkpoints": ("last_checkpoint",),
    "trainer.preemption_callback": ("PreemptionCallback",),
    "zero.engine": ("GrassEngine",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}


def _module(name: str) -> ModuleType:
    """Import a module. The error names a missing extra, or packages outside of their tested range."""
    try:
        return import_module(name)
    except (ImportError, RuntimeError) as error:  # transformers 4 makes a RuntimeError of every failed import
        if isinstance(error, ModuleNotFoundError) and error.name in versions.EXTRAS:
            command = versions.remedy(error.name) if error.name in versions.RANGES else f"pip install {error.name}"
            raise ImportError(f"{error}: {command} (extra {versions.EXTRAS[error.name]!r} of grass_ds)") from error
        sentence = versions.untested(name for name in versions.RANGES if f"pip install '{name}" not in str(error))
        if not sentence:
            raise
        raise ImportError(f"{error}. It may be why: {sentence}") from error


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(_module(f"grass_ds.{_MODULES[name]}"), name)
    if name == "placement":  # moved; its old name works for one release
        warnings.warn("grass_ds.placement is now grass_ds.cluster.placement", DeprecationWarning, stacklevel=2)
        return _module("grass_ds.cluster.placement")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
