# SPDX-License-Identifier: Apache-2.0
"""What the checks found, and the report of it."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """``status``: :data:`OK`, :data:`WARN` (training works, but not as well as it could), :data:`FAIL`."""

    check: str
    status: str
    finding: str
    remedy: str = ""


def examine(name: str, check: Callable[..., Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """All findings of ``check``. An exception in it is a finding, too, and hides none of the others."""
    found: list[Finding] = []
    try:
        found.extend(check(*arguments))
    except Exception as error:  # whatever is broken on this machine, the user wants to know
        found.append(Finding(name, FAIL, f"{type(error).__name__}: {error}".rstrip(": ")))
    return found


@dataclass
class Report:
    """All findings, and a row with the placement of each rank. Rank 0 writes them to ``stream``."""

    stream: TextIO
    as_json: bool = False
    findings: list[Finding] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    rank: int = 0

    def write(self) -> int:
        """Write the report; returns the exit code, 1 if a check failed."""
        failed = [finding for finding in self.findings if finding.status == FAIL]
        if self.rank == 0:
            print(self._json() if self.as_json else self._text(), file=self.stream, flush=True)
        elif not self.ranks:  # the ranks did not meet, so rank 0 does not know these
            sys.stderr.write("".join(f"rank {self.rank}: {each.check}: {each.finding}\n" for each in failed))
        return int(bool(failed))

    def _json(self) -> str:
        status = max((finding.status for finding in self.findings), key=(OK, WARN, FAIL).index)
        found = [asdict(finding) for finding in self.findings]
        return json.dumps({"status": status, "findings": found, "ranks": self.ranks}, indent=2)

    def _text(self) -> str:
        lines = []
        for finding in self.findings:  # not wrapped: a path must not be cut
            remedy = f"\n{'':<26}remedy: {finding.remedy}" if finding.remedy else ""
            lines.append(f"{finding.status:<6}{finding.check:<20}{finding.finding}{remedy}")
        lines += ["  ".join(f"{key}: {value}" for key, value in row.items()) for row in self.ranks]
        ready = all(finding.status != FAIL for finding in self.findings)
        return "\n".join([*lines, "training can start" if ready else "not ready to train"])
