# SPDX-License-Identifier: Apache-2.0
"""The loss of each method for the same steps, arithmetic, or CPU seconds."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from benchmarks import cost_model
from benchmarks.quality.suite import COMPARED
from benchmarks.report.table import mean, table

Row = dict[str, Any]
Point = dict[str, float]
BUDGETS = {"step": "steps", "tflop": "TFLOP", "cpu_seconds": "CPU s"}


def untrained_loss(rows: Sequence[Row], task: str) -> float | None:
    """Development loss before any step, if there is a row of it."""
    return next((row["dev_loss"] for row in rows if row["task"] == task and row["steps"] == 0), None)


def comparable(budget: str, mine: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether these rows compare with those of ``grass``; CPU seconds only of the same commit and machine."""

    def measured_at(row: Row) -> tuple[str, str, int, int]:
        return row["commit"], row["hardware"], row["threads"], row["jobs"]

    return budget != "cpu_seconds" or {measured_at(row) for row in mine} <= {
        measured_at(row) for row in rows if row["method"] == "grass"
    }


def step_flops(row: Row) -> list[int]:
    """FLOPs of every step, padding and probing included, by the cost model, which equals what is observed."""
    active = row["active"] or [None] * row["steps"]
    return [
        cost_model.flops({**row, "micro_batch": rows, "sequence": tokens}, layers)
        for (rows, tokens), layers in zip(row["batches"], active, strict=True)
    ]


def points(row: Row, untrained: float | None) -> list[Point]:
    """The curve of development losses with what was spent by then; begins with the untrained loss, if it is known."""
    tflop = [flops / 1e12 for flops in accumulate(step_flops(row))]
    begin = [] if untrained is None else [{**dict.fromkeys(BUDGETS, 0.0), "dev_loss": untrained}]
    return [*begin, *({**point, "tflop": tflop[point["step"] - 1]} for point in row["curve"])]


def loss_at(curve: Sequence[Point], budget: str, spent: float) -> float | None:
    """The development loss, linear between two points of the curve; None outside them."""
    for before, after in pairwise(curve):
        if before[budget] <= spent <= after[budget]:
            share = (spent - before[budget]) / (after[budget] - before[budget])
            return before["dev_loss"] + share * (after["dev_loss"] - before["dev_loss"])
    return None


def budget_table(rows: Sequence[Row], untrained: float | None) -> str:
    """A line per method: its loss when it has spent what the cheapest run spends in all; means over seeds."""
    runs = {method: [row for row in rows if row["method"] == method and row.get("curve")] for method in COMPARED}
    curves = {method: [points(row, untrained) for row in mine] for method, mine in runs.items() if mine}
    known = {what: {one for one in curves if comparable(what, runs[one], rows)} for what in BUDGETS}
    least = {
        what: min(curve[-1][what] for one in methods for curve in curves[one])
        for what, methods in known.items()
        if methods
    }

    def total(method: str, what: str) -> str:
        return mean([curve[-1][what] for curve in curves[method]], 0) if method in known[what] else ""

    def loss(method: str, what: str) -> str:
        found = [loss_at(curve, what, least[what]) for curve in curves[method]]
        return mean(found, 3) if method in known[what] else ""

    return table(
        "Development loss for the same budget",
        curves,
        {
            "method": lambda method: method,
            **{
                f"{BUDGETS[what]} in all": lambda method, what=what: total(method, what)
                for what in least
                if what != "step"
            },
            **{
                f"loss at {spent:.0f} {BUDGETS[what]}": lambda method, what=what: loss(method, what)
                for what, spent in least.items()
            },
        },
    )
