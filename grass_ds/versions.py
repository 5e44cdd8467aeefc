# SPDX-License-Identifier: Apache-2.0
"""The ranges of versions that grass_ds is tested with; ``tests/edges`` runs both edges of each.

Nothing is refused by its number alone: an untested version is a warning at start.
"""

import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

RANGES = {
    "python": ">=3.10,<3.14",
    "torch": ">=2.6,<2.16",
    "deepspeed": ">=0.19.3,<0.20",
    "transformers": ">=4.51,<6",
    "accelerate": ">=1.10,<2",
    "datasets": ">=4.0,<6",
    "numpy": ">=2.0,<3",
}
"""Range of each package, and of Python itself; the requirements of grass_ds and its extras have the same."""

EXTRAS = {
    "transformers": "hf",
    "accelerate": "hf",
    "matplotlib": "plots",
    "datasets": "launch",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mpi4py": "mpi",
    "peft": "peft",
}
"""Optional package -> the extra of grass_ds that installs it."""


def installed(name: str) -> str | None:
    """The version of a package, or of Python; None if there is none."""
    if name == "python":
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_tested(name: str, found: str) -> bool:
    """Whether a version of package ``name`` is in its range; local builds and nightlies count as their release."""
    try:
        return Version(found).base_version in SpecifierSet(RANGES[name])
    except InvalidVersion:
        return False


def remedy(name: str) -> str:
    """How to get a tested version of package ``name``."""
    return f"use a Python {RANGES[name]}" if name == "python" else f"pip install '{name}{RANGES[name]}'"


def untested(names: Iterable[str]) -> str:
    """One sentence about those of ``names`` that are installed outside of their range; empty if there are none."""
    outside = [
        f"{name} {found} (tested: {RANGES[name]}; {remedy(name)})"
        for name in names
        if (found := installed(name)) is not None and not is_tested(name, found)
    ]
    return f"grass_ds is not tested with {', '.join(outside)}" if outside else ""
