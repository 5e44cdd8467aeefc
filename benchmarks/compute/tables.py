# SPDX-License-Identifier: Apache-2.0
"""The table of suite ``compute``: seconds beside FLOPs, of full fine-tuning."""

import statistics
from functools import cache

import torch

from benchmarks import cost_model
from benchmarks.case import Row
from benchmarks.frontier.suite import Setting, setting
from benchmarks.frontier.tables import NAMES
from benchmarks.report import row_groups
from benchmarks.report.row_groups import RowGroup, live_peak, memory_ratio, step_seconds
from benchmarks.report.table import Columns, conditions, each, median, median_range, table

DRAWS = 1000


def tables(rows: list[Row]) -> list[str]:
    lines = [
        RowGroup(row_groups.setting(mine[0]), mine, rows)
        for key in dict.fromkeys(map(_key, rows))
        if (mine := [row for row in rows if _key(row) == key])
    ]
    names: Columns = {
        **{name: lambda one, cell=cell: cell(setting(one.rows[0])) for name, cell in NAMES.items()},
        "checkpointing": lambda one: "yes" if one.setting.checkpointing else "",
    }
    columns = {
        "s / step": lambda one: median_range(one.values(step_seconds), 1),
        "of full": lambda one: median_range(one.ratios("full", 2, step_seconds)),
        "FLOPs of these steps, of full": lambda one: median_range(one.ratios("full", 2, _flops)),
        "FLOPs of all draws, of full": lambda one: median(one.ratios("full", 2, _expected)),
        "GFLOP/s": lambda one: median(one.values(lambda row: _flops(row) / step_seconds(row)), 0, 1e-9),
        "live tensors, GB": lambda one: median(one.values(live_peak), 2, 1e-9),
        "of the cost model": lambda one: median_range(one.values(memory_ratio)),
    }
    allocator = each(rows, "glibc").replace("glibc.malloc.", "").replace(":", ", ") or "defaults"
    return [
        "## Where arithmetic rules",
        conditions(rows, f"glibc.malloc: {allocator}"),
        table("A step of 4 x 512 tokens", lines, names, columns),
    ]


def _key(row: Row) -> tuple[bool, Setting]:
    return row["checkpointing"], setting(row)


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
