# SPDX-License-Identifier: Apache-2.0
"""The doctor from start to end. Checks that need torch and DeepSpeed are imported only when both load."""

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding, Report, examine
from grass_ds.versions import RANGES, installed, is_tested, remedy


def run(
    config: str | None,
    nvme_path: str | None,
    shared_path: str | None,
    as_json: bool,
    needs: Mapping[str, Any] | None = None,
) -> int:
    """Check everything and report on stdout; the arguments are those of the command line.

    Args:
        needs: what a plan needs of the machine.

    Returns:
        The exit code: 1 if training would fail or compute in an emulated precision, else 0.
    """
    with _libraries_print_to_stderr() as stream:
        report = Report(stream, as_json)
        report.findings += examine("versions", check_versions) + examine("import", check_import)
        if report.findings[-1].status != FAIL:
            from grass_ds.doctor.checks import check_all

            check_all(report, config, nvme_path, shared_path, needs)
        return report.write()


@contextmanager
def _libraries_print_to_stderr() -> Iterator[TextIO]:
    """Inside, what libraries print, those in C++ included, goes to stderr. The yielded stream is the former stdout."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", errors="backslashreplace") as stream:
        os.dup2(2, 1)
        try:
            yield stream
        finally:
            sys.stdout.flush()
            os.dup2(stream.fileno(), 1)


def check_versions() -> Iterator[Finding]:
    """Python and the installed packages that have a tested range. What is missing is left to ``pip check``."""
    for name, tested in RANGES.items():
        found = installed(name)
        if found is not None and is_tested(name, found):
            yield Finding(name, OK, f"{found} ({tested})")
        elif found is not None:
            yield Finding(name, WARN, f"{found} is outside of the tested range {tested}", remedy(name))


def check_import() -> Iterator[Finding]:
    """Load the library, which also checks DeepSpeed for the names that it needs."""
    importlib.import_module("grass_ds.zero.engine")
    yield Finding("import", OK, "torch, deepspeed and grass_ds load")
