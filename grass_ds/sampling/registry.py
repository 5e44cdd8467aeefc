# SPDX-License-Identifier: Apache-2.0
"""Which class a ``"sampler"`` names: one of ours, of an installed package, or of the user's own code."""

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from grass_ds.sampling.ist_sampler import IstSampler
from grass_ds.sampling.module_sampler import ModuleSampler
from grass_ds.sampling.samplers import (
    CyclicSampler,
    FullSampler,
    GrassSampler,
    OutlierSampler,
    Sampler,
    StaticSampler,
)

GROUP = "grass_ds.samplers"
SAMPLERS: dict[str, type[Sampler]] = {
    "grass": GrassSampler,
    "static": StaticSampler,
    "outlier": OutlierSampler,
    "uniform": Sampler,
    "cyclic": CyclicSampler,
    "module": ModuleSampler,
    "ist": IstSampler,
    "full": FullSampler,
}


def find_sampler(name: str) -> type[Sampler]:
    """The class.

    Args:
        name: a key of :data:`SAMPLERS`, an entry point of the group :data:`GROUP`, or ``package.module.Class``.

    Raises:
        ValueError: there is none of that name, it cannot be imported, or it is no :class:`Sampler`.
    """
    if name in SAMPLERS:
        return SAMPLERS[name]
    offered = {point.name: point for point in entry_points(group=GROUP)}
    if name not in offered and "." not in name:
        known = [*SAMPLERS, *sorted(offered)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise ValueError(
            f"there is no sampler of this name: {hint}use {', '.join(known)}, or the path of a class, as in "
            '"my_package.my_module.MySampler"'
        )
    try:
        found: Any = offered[name].load() if name in offered else _imported(name)
    except Exception as error:  # whatever the module of others does
        raise ValueError(f"this sampler cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Sampler)):
        raise ValueError(f"{found!r} is no subclass of {Sampler.__module__}.{Sampler.__qualname__}")
    return found


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
