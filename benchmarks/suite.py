# SPDX-License-Identifier: Apache-2.0
"""What a suite is: cases to measure, and tables of their rows."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.case import Case

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks of a suite; ``rows`` are those in its file.

    Attributes:
        rounds: repetitions of the whole suite, each with a seed of its own (not of quality).
        parts, tasks: of the quality suite.
    """

    rounds: int = 3
    parts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    rows: Sequence[Row] = ()


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Add a suite by writing both functions and naming it in ``suites.SUITES``.

    Attributes:
        cases: the cases that can run given the rows that are there, in order; ``run.py`` skips those that have a row,
            and asks again until none is left.
        tables: rows -> blocks of Markdown: headings, conditions, tables of ``report.table``.
        plots: writes plots of the rows into a folder.
        needs_disk: cases write into a folder on a local disk.
    """

    cases: Callable[[Request], Iterable[Case]]
    tables: Callable[[list[Row]], list[str]]
    plots: Callable[[list[Row], Path], None] | None = None
    needs_disk: bool = False
