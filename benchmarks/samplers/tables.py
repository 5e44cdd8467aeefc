# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``samplers``: one of all tasks, and one per task."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from benchmarks.case import Row
from benchmarks.quality.tables import task_conditions
from benchmarks.report.row_groups import Measure, RowGroup, group_rows
from benchmarks.report.table import conditions, interval, mean_deviation, table
from benchmarks.samplers.suite import BASE, GAMMA, RATE, RATES, SAMPLERS
from benchmarks.tasks import TASKS

LOSSES: dict[str, Callable[[RowGroup], str]] = {
    "test loss": lambda one: mean_deviation(one.values(_loss)),
    f"test loss - {BASE}": lambda one: mean_deviation(_differences(one, _loss), "+"),
    "95 % interval of the mean": lambda one: interval(_differences(one, _loss)),
}


def tables(rows: list[Row]) -> list[str]:
    """One table of all tasks, then a section per task with rows."""
    by_task = {task: mine for task in TASKS if (mine := [row for row in rows if row["task"] == task])}
    blocks = ["## Samplers", overview(by_task)] if by_task else []
    for task, mine in by_task.items():
        others = "".join(f", {rate:g} for {sampler}" for sampler, rate in RATES.items())
        text = f"{GAMMA} layers at a time, learning rate {RATE:g}{others}"
        blocks += [f"## Samplers: task `{task}`", conditions(mine, text, *task_conditions(task, mine))]
        blocks.append(results(mine))
    return blocks


def overview(by_task: Mapping[str, Sequence[Row]]) -> str:
    """Test losses, and differences from the base at equal seeds: a line per sampler."""
    columns = {}
    for task, rows in by_task.items():
        groups = {one.setting.method: one for one in group_rows(rows)}
        columns |= {f"`{task}`: {name}": partial(_cell, groups, show) for name, show in LOSSES.items()}
    return table("Test loss on all tasks", SAMPLERS, {"sampler": str}, columns)


def _cell(groups: Mapping[str, RowGroup], show: Callable[[RowGroup], str], sampler: str) -> str:
    return show(groups[sampler]) if sampler in groups else ""


def results(rows: Sequence[Row]) -> str:
    """Means over the seeds, and differences from the base at equal seeds."""
    columns = {
        **LOSSES,
        "accuracy": lambda one: mean_deviation(one.values(_accuracy)),
        f"accuracy - {BASE}": lambda one: mean_deviation(_differences(one, _accuracy), "+"),
        "seeds": lambda one: str(len(one.rows)),
    }
    return table("Test loss and accuracy", group_rows(rows), {"sampler": lambda one: one.setting.method}, columns)


def _differences(one: RowGroup, measure: Measure) -> list[float]:
    return [] if one.setting.method == BASE else one.differences(BASE, one.setting.stage, measure)


def _loss(row: Row) -> float:
    return row["test_loss"]


def _accuracy(row: Row) -> float:
    """Mean over the sources."""
    return statistics.fmean(row["accuracy"].values())
