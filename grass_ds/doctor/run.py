# SPDX-License-Identifier: Apache-2.0
"""The doctor from start to end. Checks that need torch and DeepSpeed are imported only when both load."""

import contextlib
import importlib
import sys
from collections.abc import Iterator

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding, Report, examine
from grass_ds.versions import RANGES, installed, is_tested, remedy

NEEDED = ("python", "torch", "deepspeed", "numpy")
"""What the library does not work without; the other packages belong to extras."""


def run(
    config: str | None = None, nvme_path: str | None = None, shared_path: str | None = None, as_json: bool = False
) -> int:
    """Check everything and report on stdout.

    Args:
        config: the DeepSpeed config for training; its precision is compared with what the device computes.
        nvme_path: the folder for ``grass.offload.nvme_path``; its speed is measured.
        shared_path: a folder that all machines should share (for checkpoints).
        as_json: report one JSON object instead of text.

    Returns:
        The exit code: 1 if training would fail or compute in an emulated precision, else 0.
    """
    report = Report(sys.stdout, as_json)
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed prints what it loads
        report.findings += examine("versions", check_versions)
        loaded = examine("import", check_import)
        report.findings += loaded
        if loaded[-1].status != FAIL:
            from grass_ds.doctor.checks import check_all

            check_all(report, config, nvme_path, shared_path)
    return report.write()


def check_versions() -> Iterator[Finding]:
    """Python and the packages that have a tested range."""
    for name, tested in RANGES.items():
        found = installed(name)
        if found is None and name in NEEDED:
            yield Finding(name, FAIL, "not installed", remedy(name))
        elif found is None:
            yield Finding(name, OK, f"not installed, and needed by the Trainer or launch/ only: {remedy(name)}")
        elif is_tested(name, found):
            yield Finding(name, OK, f"{found} ({tested})")
        else:
            yield Finding(name, WARN, f"{found} is outside of the tested range {tested}", remedy(name))


def check_import() -> Iterator[Finding]:
    """Load the library, which also checks DeepSpeed for the names that it needs."""
    importlib.import_module("grass_ds.zero.engine")
    yield Finding("import", OK, "torch, deepspeed and grass_ds load")
