# SPDX-License-Identifier: Apache-2.0
"""The doctor from start to end. The checks that need torch and DeepSpeed are imported when both load."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from grass_ds.doctor import software
from grass_ds.doctor.finding import FAIL, Report, examine


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
    with _quiet_stdout() as stream:
        report = Report(stream, as_json)
        report.findings += examine("versions", software.check_versions)
        loaded = examine("import", software.check_import)
        report.findings += loaded
        if loaded[-1].status != FAIL:
            from grass_ds.doctor.checks import check_all

            check_all(report, config, nvme_path, shared_path)
        return report.write()


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[TextIO]:
    """Send what libraries print to stderr, C++ ones included; the stream is the former stdout."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", errors="backslashreplace") as stream:
        os.dup2(2, 1)
        try:
            yield stream
        finally:
            sys.stdout.flush()
            os.dup2(stream.fileno(), 1)
