# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of groups of rows, and the figures in their cells."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.case import Row

# Name of a column -> cell of a group.
Columns = Mapping[str, Callable[[Any], str]]
# Student's t, 97.5 %, by number of values.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}


def table(title: str, groups: Iterable[Any], names: Columns, columns: Columns) -> str:
    """A heading and a line per group: its names, its figures. Lines and columns without figures are left out."""
    lines = [
        ([name(group) for name in names.values()], [cell(group) for cell in columns.values()]) for group in groups
    ]
    lines = [line for line in lines if any(line[1])]
    if not lines:
        return ""
    shown = [index for index in range(len(columns)) if any(cells[index] for _, cells in lines)]
    head = [*names, *(list(columns)[index] for index in shown)]
    body = [[*name, *(cells[index] for index in shown)] for name, cells in lines]
    marked = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    return "\n".join([*([f"### {title}", ""] if title else []), *marked])


def conditions(rows: Sequence[Row], *more: str) -> str:
    """What all rows of a suite share, one line per subject."""
    one = rows[0]
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    lines = [
        f"{one['model']}, {each(rows, 'dtype')}, fused AdamW, clip 1.0",
        f"micro-batch {each(rows, 'micro_batch')} x {each(rows, 'sequence')} tokens, {each(rows, 'ranks')} rank(s)",
        f"{one['device']}: {each(rows, 'hardware')}; threads per rank {each(rows, 'threads')}",
        f"cases at a time {each(rows, 'jobs')}",
        *more,
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commits {each(rows, 'commit', ', ')}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def each(rows: Iterable[Row], key: str, separator: str = " / ") -> str:
    """Every value that the rows have, once."""
    return separator.join(str(value) for value in sorted({row[key] for row in rows}))


def hardware(rows: Iterable[Row], among: Iterable[Row]) -> str:
    """Names of the processors of the rows; empty if all rows ``among`` which they stand ran on one kind."""
    if len({row["hardware"] for row in among}) == 1:
        return ""
    return " / ".join(sorted({row["hardware"].split(",")[0] for row in rows}))


# ---- figures; empty where there is nothing to show -----------------------------------------------------------------


def median(values: Sequence[float], digits: int = 2, scale: float = 1.0) -> str:
    return f"{statistics.median(values) * scale:.{digits}f}" if values else ""


def mean(values: Iterable[float], digits: int = 2) -> str:
    found = list(values)
    return f"{statistics.fmean(found):.{digits}f}" if found else ""


def median_range(values: Sequence[float], digits: int = 2) -> str:
    """Median, and with several values the least and the largest."""
    if len(values) < 2:
        return median(values, digits)
    return f"{median(values, digits)} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def mean_deviation(values: Sequence[float], sign: str = "") -> str:
    """Mean, and with several values their standard deviation; ``sign`` "+": of differences."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.3f}{deviation}"


def interval(values: Sequence[float]) -> str:
    """95 % confidence interval of the mean; empty for fewer than 2 or more than 5 values."""
    if len(values) not in STUDENT:
        return ""
    reach = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values) - reach:+.3f} to {statistics.fmean(values) + reach:+.3f}"
