# SPDX-License-Identifier: Apache-2.0
"""What one check found, and a table of them for a terminal or a log file."""

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OK, WARN, FAIL = "ok", "warn", "FAIL"
WIDTH = 118


@dataclass(frozen=True)
class Finding:
    """``status`` is :data:`OK`, :data:`WARN` (training works, though not as well as it could) or :data:`FAIL` (it would not start)."""

    check: str
    status: str
    finding: str
    remedy: str = ""


def examine(name: str, check: Callable[..., Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """What ``check`` finds; a check that breaks down is a finding too, and hides none of the others."""
    found: list[Finding] = []
    try:
        found.extend(check(*arguments))
    except Exception as error:  # whatever is broken on this machine is what the user wants to hear of
        found.append(Finding(name, FAIL, f"{type(error).__name__}: {error}".rstrip(": ")))
    return found


def worst(findings: Iterable[Finding]) -> str:
    """The status that counts for all of them."""
    return max((finding.status for finding in findings), key=(OK, WARN, FAIL).index, default=OK)


def finding_lines(findings: Sequence[Finding]) -> list[str]:
    """A table with the remedy below what it is for, no line longer than :data:`WIDTH` unless a word is."""
    indent = max(len("check"), *(len(finding.check) for finding in findings))
    lines = [f"{'check':<{indent}}  status  finding", "-" * WIDTH]
    for finding in findings:
        text = _wrapped(finding.finding, WIDTH - indent - 10)
        if finding.remedy:
            text += _wrapped(f"remedy: {finding.remedy}", WIDTH - indent - 10)
        lines.append(f"{finding.check:<{indent}}  {finding.status:<6}  {text[0]}")
        lines += [f"{'':<{indent + 10}}{line}" for line in text[1:]]
    return lines


def row_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table of ``rows``, which have the same keys."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _wrapped(text: str, width: int) -> list[str]:
    # A path is copied from here, so it must not be cut.
    lines = [textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()]
    return [part for line in lines for part in line] or [""]
