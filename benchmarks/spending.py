# SPDX-License-Identifier: Apache-2.0
"""What a quality run has spent when its loss was measured, and the loss of each method for the same spending."""

import statistics
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from benchmarks import floors
from benchmarks.contest import METHODS
from benchmarks.methods import METHODS as KNOWN
from benchmarks.places import header, line

Row = dict[str, Any]
Point = dict[str, float]
SPENT = {"step": "steps", "tflop": "TFLOP of the steps", "cpu_seconds": "CPU seconds of the steps"}


def untrained_loss(rows: Sequence[Row], task: str) -> float | None:
    """Of the model before any step, if there is a row of it."""
    return next((row["dev_loss"] for row in rows if row["task"] == task and row["steps"] == 0), None)


def compares(what: str, mine: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether what these rows have spent compares with what ``grass`` has.

    All but CPU seconds do; those of other commits are of another day, and machines differ.
    """

    def when_and_where(row: Row) -> tuple[str, str, int, int]:
        return row["commit"], row["hardware"], row["threads"], row["jobs"]

    return what != "cpu_seconds" or {when_and_where(row) for row in mine} <= {
        when_and_where(row) for row in rows if row["method"] == "grass"
    }


def step_flops(row: Row) -> list[int]:
    """FLOPs of every step, padding and probing included. Closed forms: what engines are observed to compute (cost suite)."""
    active = row["active"] or [None] * row["steps"]
    return [
        floors.flops({**row, "micro_batch": rows, "sequence": tokens}, layers)
        for (rows, tokens), layers in zip(row["batches"], active, strict=True)
    ]


def points(row: Row, untrained: float | None) -> list[Point]:
    """The row's curve of development losses with what was spent until then; begins with the loss that nothing costs, if it is known."""
    tflop = [flops / 1e12 for flops in accumulate(step_flops(row))]
    begin = [] if untrained is None else [{**dict.fromkeys(SPENT, 0.0), "dev_loss": untrained}]
    return [*begin, *({**point, "tflop": tflop[point["step"] - 1]} for point in row["curve"])]


def loss_at(curve: Sequence[Point], what: str, spent: float) -> float | None:
    """The development loss, linear between two points of the curve; None outside them."""
    for before, after in pairwise(curve):
        if before[what] <= spent <= after[what]:
            share = (spent - before[what]) / (after[what] - before[what])
            return before["dev_loss"] + share * (after["dev_loss"] - before["dev_loss"])
    return None


def spending_table(rows: Sequence[Row], untrained: float | None) -> list[str]:
    """One line per method: its loss when it has spent what the most frugal one spends in all; means over the seeds."""
    drawn = {method: [row for row in rows if row["method"] == method and row.get("curve")] for method in METHODS}
    curves = {method: [points(row, untrained) for row in mine] for method, mine in drawn.items() if mine}
    # Methods that a kind of spending compares.
    known = {what: [method for method in curves if compares(what, drawn[method], rows)] for what in SPENT}
    least = {
        what: min(curve[-1][what] for method in methods for curve in curves[method])
        for what, methods in known.items()
        if methods
    }
    lines = header(
        "method",
        *(f"{label}, in all" for what, label in SPENT.items() if what in least and what != "step"),
        *(f"development loss at {spent:.0f} {SPENT[what]}" for what, spent in least.items()),
    )
    for method, found in curves.items():
        shown = {what: found if method in known[what] else [] for what in least}
        totals = [mean_of_all([curve[-1][what] for curve in shown[what]], 0) for what in least if what != "step"]
        losses = [mean_of_all([loss_at(curve, what, least[what]) for curve in shown[what]], 3) for what in least]
        lines.append(line([KNOWN[method].bare_label, *totals, *losses]))
    return lines


def mean_of_all(values: Sequence[float | None], digits: int) -> str:
    """Empty unless all are known."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.{digits}f}" if known and len(known) == len(values) else ""
