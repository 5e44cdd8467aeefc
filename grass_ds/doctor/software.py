# SPDX-License-Identifier: Apache-2.0
"""The installed packages against the tested ranges, and whether they load."""

import importlib
from collections.abc import Iterator

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding
from grass_ds.versions import RANGES, installed, is_tested, remedy

NEEDED = ("python", "torch", "deepspeed", "numpy")
"""What the library does not work without; the other packages belong to extras."""


def check_versions() -> Iterator[Finding]:
    """Python and the packages that have a tested range."""
    for name in RANGES:
        yield judge_version(name, installed(name))


def judge_version(name: str, found: str | None) -> Finding:
    """Compare version ``found`` (None: not installed) of the package ``name`` with its range."""
    if found is None and name not in NEEDED:
        return Finding(name, OK, f"not installed, and needed by the Trainer or launch/ only: {remedy(name)}")
    if found is None:
        return Finding(name, FAIL, "not installed", remedy(name))
    if is_tested(name, found):
        return Finding(name, OK, f"{found} ({RANGES[name]})")
    return Finding(name, WARN, f"{found} is outside of the tested range {RANGES[name]}", remedy(name))


def check_import() -> Iterator[Finding]:
    """Load the library, which also checks DeepSpeed for the names that it needs."""
    importlib.import_module("grass_ds.zero.engine")
    yield Finding("import", OK, "torch, deepspeed and grass_ds load")
