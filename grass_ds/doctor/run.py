# SPDX-License-Identifier: Apache-2.0
"""All checks in a row: first every rank by itself, then the ranks together. Rank 0 reports."""

import contextlib
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from grass_ds.doctor import software
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding, examine, finding_lines, row_lines, worst

if TYPE_CHECKING:
    from grass_ds.cluster.placement import Placement


class Report:
    """Where the findings are written, and how."""

    def __init__(self, stream: TextIO, as_json: bool):
        self._stream, self._json = stream, as_json

    def write(self, findings: list[Finding], rows: list[dict[str, Any]] | None = None) -> int:
        """Write findings, and a table with ``rows``, one per rank; returns the exit code."""
        status = worst(findings)
        if self._json:
            found = [asdict(finding) for finding in findings]
            text = json.dumps({"status": status, "findings": found, "ranks": rows or []}, indent=2)
        else:
            counts = ", ".join(f"{sum(f.status == kind for f in findings)} {kind}" for kind in (OK, WARN, FAIL))
            tables = [*finding_lines(findings), *(["", *row_lines(rows)] if rows else [])]
            text = "\n".join(
                [*tables, "", f"{counts}: {'not ready to train' if status == FAIL else 'training can start'}"]
            )
        self._stream.write(text.encode("ascii", "backslashreplace").decode() + "\n")
        self._stream.flush()
        return int(status == FAIL)


def run(
    config: str | None = None, nvme_path: str | None = None, shared_path: str | None = None, as_json: bool = False
) -> int:
    """Check everything and report on stdout.

    Args:
        config: the DeepSpeed config meant for training: its precision is held against what the device computes.
        nvme_path: the folder meant for ``grass.offload.nvme_path``, to be measured.
        shared_path: a folder that all machines should share (for checkpoints).
        as_json: report one JSON object instead of tables.

    Returns:
        The exit code: 1 if training would fail or compute in an emulated precision, else 0. The same on all ranks.
    """
    with _quiet_stdout() as stream:
        report = Report(stream, as_json)
        findings = [*examine("versions", software.check_versions), *examine("wandb login", software.check_wandb)]
        loaded = examine("import", software.check_import)
        findings += loaded
        if worst(loaded) == FAIL:
            return report.write(findings)
        return _run_loaded(findings, config, nvme_path, shared_path, report)


def _run_loaded(
    findings: list[Finding], config: str | None, nvme_path: str | None, shared_path: str | None, report: Report
) -> int:
    """The checks that need torch and DeepSpeed."""
    from grass_ds.cluster.placement import PlacementError, find
    from grass_ds.doctor import disks, dtypes, extensions, machine, ranks

    findings += examine("accelerator", machine.check_accelerator)
    findings += examine("memory", machine.check_memory)
    findings += examine("extensions", extensions.check_extensions)
    findings += examine("build lock", extensions.check_locks, extensions.extensions_root())
    place = None
    try:
        place = find()
        findings += examine("launcher", ranks.check_placement, place)
    except PlacementError as error:
        findings.append(Finding("launcher", FAIL, str(error)))
    first_here = place is None or place.local_rank == 0
    if first_here:  # the ranks of a machine would slow each other down
        findings += examine("precision", dtypes.check_precision, config)
    if nvme_path is not None and first_here:
        findings += examine("nvme_path", disks.check_nvme, nvme_path)
    if place is not None and place.world_size > 1:
        return _run_together(findings, place, shared_path, report)
    if shared_path is not None:
        mark = disks.leave_mark(shared_path)
        findings += examine("shared_path", disks.check_mark, mark)
        disks.remove_mark(mark)
    return report.write(findings)


def _run_together(findings: list[Finding], place: "Placement", shared_path: str | None, report: Report) -> int:
    """Compare the ranks, then let them talk to each other."""
    from grass_ds.doctor import bandwidth, disks, extensions, ranks
    from grass_ds.doctor.rendezvous import Meeting

    try:
        meeting = Meeting(place)
        mark = None
        if shared_path is not None:
            mark = meeting.share("mark", disks.leave_mark(shared_path) if place.rank == 0 else None)
            findings += examine("shared_path", disks.check_mark, mark)
        mine = {"facts": ranks.facts(place), "ready": extensions.communication_ready()}
        heard = meeting.gather("local", mine | {"findings": [asdict(finding) for finding in findings]})
        if mark is not None and place.rank == 0:
            disks.remove_mark(mark)
        findings = ranks.merge({rank: said["findings"] for rank, said in heard.items()})
        findings += (
            ranks.compare({rank: said["facts"] for rank, said in heard.items()}, place.world_size) if heard else []
        )
        rows = [ranks.row(said["facts"]) for said in heard.values()]

        def conclude(measured: list[Finding]) -> int:
            said = meeting.gather("measured", [asdict(finding) for finding in measured])
            code = meeting.share("code", report.write(findings + ranks.merge(said), rows) if place.rank == 0 else None)
            meeting.leave()
            return int(code)

        obstacle = meeting.share("obstacle", ranks.obstacle(findings, [said["ready"] for said in heard.values()]))
        if obstacle:
            return conclude([Finding("all-reduce", WARN, f"not tried: {obstacle}")])

        def give_up() -> None:  # a collective that hangs cannot be interrupted, only left behind
            try:
                conclude([bandwidth.HANGS])
            finally:
                os._exit(1)

        watch = threading.Timer(bandwidth.SECONDS, give_up)
        watch.daemon = True
        watch.start()
        measured = examine("all-reduce", bandwidth.check_all_reduce)
        watch.cancel()
        watch.join()
        return conclude(measured)
    except RuntimeError as error:  # of the store: rank 0 is not there
        text = f"rank {place.rank} has no contact with rank 0 at {place.master_addr}:{place.master_port}: {error}"
        findings.append(Finding("ranks", FAIL, text))
        if place.rank == 0:
            return report.write(findings)
        sys.stderr.write(f"{text}\n")
        return 1


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[TextIO]:
    """What libraries print, C++ ones included, goes to stderr; the stream is what was stdout."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w") as stream:
        os.dup2(2, 1)
        try:
            yield stream
        finally:
            sys.stdout.flush()
            os.dup2(stream.fileno(), 1)
