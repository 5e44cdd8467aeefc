# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``levers``."""

from collections.abc import Sequence

from benchmarks.case import Row
from benchmarks.levers.suite import BASE, GAMMA, LONG, RATE, TASK, Lever, draws, periods
from benchmarks.report.row_groups import pairs_by_seed
from benchmarks.report.table import conditions, hardware, interval, mean, mean_deviation, table


def tables(rows: list[Row]) -> list[str]:
    runs = [row for row in rows if row["kind"] == "quality"]
    if not runs:
        return []
    text = f"task `{TASK}`, {GAMMA} layers at a time, learning rate {RATE:g}; {runs[0]['test_rows']} test rows"
    return [
        "## Levers",
        conditions(runs, text),
        compare(f"Draws, {BASE.steps} steps", draws(rows), runs),
        compare(f"Periods and Adam state, {LONG} steps", periods(), runs),
    ]


def compare(title: str, levers: Sequence[Lever], rows: Sequence[Row]) -> str:
    """Losses of each, and differences from the first one at equal seeds."""
    found = {lever.name: [row for row in rows if row["cell"] == lever.case(row["seed"]).text()] for lever in levers}
    base = levers[0].name

    def differences(name: str) -> list[float]:
        pairs = [] if name == base else pairs_by_seed(found[name], found[base])
        return [row["test_loss"] - other["test_loss"] for row, other in pairs]

    columns = {
        "test loss": lambda name: mean_deviation([row["test_loss"] for row in found[name]]),
        "- the first": lambda name: mean_deviation(differences(name), "+"),
        "95 % interval of the mean": lambda name: interval(differences(name)),
        "CPU": lambda name: hardware(found[name], among=rows),
        "CPU s / step": lambda name: mean(row["cpu_seconds"] / row["steps"] for row in found[name]),
        "seeds": lambda name: str(len(found[name])) if found[name] else "",
    }
    return table(title, found, {"changed": str}, columns)
