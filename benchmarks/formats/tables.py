# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``formats``: loss of each format beside fp32 at equal seeds; bytes and time per tier."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.case import Row
from benchmarks.formats.suite import BASE, FORMATS, GAMMAS, STEPS, TIERS
from benchmarks.frontier.suite import RULE, TASK
from benchmarks.report.row_groups import Measure, pairs_by_seed, step_seconds
from benchmarks.report.table import conditions, interval, mean, mean_deviation, median, table


class Line(NamedTuple):
    """Rows of a format that differ in the seed alone, and those of fp32 under the same conditions."""

    where: str
    name: str
    rows: list[Row]
    base: list[Row]

    def pairs(self) -> list[tuple[Row, Row]]:
        """At equal seeds; none of fp32 itself."""
        return [] if self.name == BASE else pairs_by_seed(self.rows, self.base)

    def differences(self, measure: Measure) -> list[float]:
        return [measure(row) - measure(other) for row, other in self.pairs()]

    def ratios(self, measure: Measure) -> list[float]:
        return [measure(row) / measure(other) for row, other in self.pairs()]


def tables(rows: list[Row]) -> list[str]:
    trained = [row for row in rows if row["kind"] == "quality"]
    measured = [row for row in rows if row["kind"] == "cost"]
    blocks = ["## Formats of optimizer state"]
    if trained:
        text = f"task `{TASK}`, {STEPS} steps, learning rate {RULE:g} / layers; {trained[0]['test_rows']} test rows"
        blocks += [conditions(trained, text), losses(trained)]
    if measured:
        text = f"{GAMMAS[-1]} layers at a time, state of all layers present, a draw every 5 steps"
        blocks += [conditions(measured, text), costs(measured)]
    return blocks


def losses(rows: Sequence[Row]) -> str:
    """Means over the seeds, and differences from fp32 at equal seeds."""
    columns: dict[str, Callable[[Line], str]] = {
        "test loss": lambda one: mean_deviation([_test_loss(row) for row in one.rows]),
        f"test loss - {BASE}": lambda one: mean_deviation(one.differences(_test_loss), "+"),
        "95 % interval of the mean": lambda one: interval(one.differences(_test_loss)),
        f"of {BASE}": lambda one: mean(one.ratios(_test_loss), 4),
        f"development loss - {BASE}": lambda one: mean_deviation(one.differences(lambda row: row["dev_loss"]), "+"),
        "CPU s / step": lambda one: mean(row["cpu_seconds"] / row["steps"] for row in one.rows),
        "seeds": lambda one: str(len(one.rows)),
    }
    lines = _lines(rows, {str(gamma): gamma for gamma in GAMMAS}, lambda row: row["grass"]["num_active_layers"])
    return table("Formats: test loss", lines, {"layers": lambda one: one.where, **_NAME}, columns)


def costs(rows: Sequence[Row]) -> str:
    """Time of a step, and bytes of state on this rank by tier; on the device at the peak."""
    columns: dict[str, Callable[[Line], str]] = {
        "s / step": lambda one: median([step_seconds(row) for row in one.rows]),
        f"of {BASE}": lambda one: median(one.ratios(step_seconds), 3),
        "device, MB": lambda one: _state(one, "device"),
        "host, MB": lambda one: _state(one, "host"),
        "disk, MB": lambda one: _state(one, "nvme"),
    }
    lines = _lines(rows, {tier: tier for tier in TIERS}, lambda row: row["offload"])
    return table("Formats: time and bytes of state", lines, {"`offload`": lambda one: one.where, **_NAME}, columns)


_NAME: dict[str, Callable[[Line], str]] = {"`state_format`": lambda one: one.name}


def _lines(rows: Sequence[Row], places: dict[str, object], place: Callable[[Row], object]) -> list[Line]:
    found = []
    for where, value in places.items():
        by_format = {
            name: [row for row in rows if place(row) == value and row["grass"]["offload"]["state_format"] == name]
            for name in FORMATS
        }
        found += [Line(where, name, mine, by_format[BASE]) for name, mine in by_format.items() if mine]
    return found


def _state(one: Line, tier: str) -> str:
    return f"{statistics.median(row['bytes']['optimizer_state'].get(tier, 0) for row in one.rows) / 1e6:.1f}"


def _test_loss(row: Row) -> float:
    return row["test_loss"]
