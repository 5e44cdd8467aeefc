# SPDX-License-Identifier: Apache-2.0
"""The table of suite ``compute``: seconds beside FLOPs, of full fine-tuning."""

import statistics
from collections.abc import Sequence
from functools import cache
from itertools import groupby

import torch

from benchmarks import cost_model
from benchmarks.case import Row
from benchmarks.frontier.suite import Setting, setting
from benchmarks.frontier.tables import NAMES
from benchmarks.report.row_groups import Measure, live_peak, memory_ratio, step_seconds
from benchmarks.report.table import Columns, conditions, median, median_range, table

DRAWS = 1000


def tables(rows: list[Row]) -> list[str]:
    order = [*dict.fromkeys(map(_key, rows))]
    rows = sorted(rows, key=lambda row: order.index(_key(row)))
    lines = [list(mine) for _, mine in groupby(rows, _key)]
    names: Columns = {
        **{name: lambda mine, cell=cell: cell(setting(mine[0])) for name, cell in NAMES.items()},
        "checkpointing": lambda mine: "yes" if mine[0]["checkpointing"] else "",
    }
    columns = {
        "s / step": lambda mine: median_range([step_seconds(row) for row in mine], 1),
        "of full": lambda mine: median_range([_of_full(row, rows, step_seconds) for row in mine]),
        "FLOPs of these steps, of full": lambda mine: median_range([_of_full(row, rows, _flops) for row in mine]),
        "FLOPs of all draws, of full": lambda mine: median([_expected(mine[0]) / _expected(_full(mine[0], rows))]),
        "GFLOP/s": lambda mine: median([_flops(row) / step_seconds(row) for row in mine], 0, 1e-9),
        "live tensors, GB": lambda mine: median([live_peak(row) for row in mine], 2, 1e-9),
        "of the cost model": lambda mine: median_range([memory_ratio(row) for row in mine]),
    }
    return ["## Where arithmetic rules", conditions(rows), table("A step of 4 x 512 tokens", lines, names, columns)]


def _key(row: Row) -> tuple[bool, Setting]:
    return row["checkpointing"], setting(row)


def _full(row: Row, rows: Sequence[Row]) -> Row:
    """Of the same round."""
    same = (row["checkpointing"], row["seed"])
    return next(one for one in rows if one["method"] == "full" and (one["checkpointing"], one["seed"]) == same)


def _of_full(row: Row, rows: Sequence[Row], measure: Measure) -> float:
    return measure(row) / measure(_full(row, rows))


def _flops(row: Row) -> float:
    """Mean over the measured steps."""
    return statistics.fmean(cost_model.flops(row, active) for active in row["active"])


def _expected(row: Row) -> float:
    """FLOPs of a step, mean over uniform draws."""
    gamma = setting(row).gamma
    if gamma is None:
        return cost_model.flops(row, None)
    draws = _draws(row["shape"]["layers"], gamma)
    return statistics.fmean(cost_model.flops(row, list(active)) for active in draws)


@cache
def _draws(layers: int, gamma: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(sorted(torch.randperm(layers, generator=generator)[:gamma].tolist())) for _ in range(DRAWS)]
