# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``gpu``, two per model: time, and memory beside the paper's."""

import statistics
from collections.abc import Callable

from benchmarks.case import Row
from benchmarks.offload.tables import median_of_base, state_bytes, sum_of_base
from benchmarks.report.row_groups import RowGroup, group_rows, tokens
from benchmarks.report.table import Columns, conditions, median, table

# Peak device memory that the GRASS paper (arXiv 2604.07808) reports for one GPU, GB: model -> method.
PAPER = {
    "tinyllama-random": {"grass": 4.49, "lisa": 4.93, "lora": 4.71, "full": 8.76},
    "gemma-2b-random": {"grass": 12.45, "lisa": 13.33, "lora": 11.26, "full": 21.19},
    "llama2-7b-random": {"grass": 19.08, "lisa": 22.31, "lora": 19.97, "full": 51.32},
}
NAMES: Columns = {
    "method": lambda one: one.setting.method,
    "ZeRO": lambda one: str(one.setting.stage),
    "GPUs": lambda one: str(one.rows[0]["ranks"]),
    "batch": lambda one: str(one.rows[0]["micro_batch"]),
    "`offload`": lambda one: one.setting.offload or "",
}


def tables(rows: list[Row]) -> list[str]:
    """A section per model. Rows are compared within a number of GPUs and a micro-batch."""
    blocks = []
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        sizes = sorted({_size(row) for row in mine})
        groups = [one for size in sizes for one in group_rows([row for row in mine if _size(row) == size])]
        blocks += [f"## GPU: {model}", conditions(mine, "gradient checkpointing (non-reentrant), random weights")]
        blocks += [table(f"{model}: {title}", groups, NAMES, columns) for title, columns in TABLES.items()]
    return blocks


def _size(row: Row) -> tuple[int, int]:
    return row["ranks"], row["micro_batch"]


def _if_fitting(figure: Callable[[RowGroup], str]) -> Callable[[RowGroup], str]:
    return lambda one: "" if "skipped" in one.rows[0] else figure(one)


def _paper(one: RowGroup) -> str:
    """The paper's figure, on one device with the method's own "offload" block."""
    row = one.rows[0]
    peak = PAPER.get(row["model"], {}).get(row["method"])
    return f"{peak:.2f}" if peak is not None and row["ranks"] == 1 and row["offload"] is None else ""


TABLES: dict[str, Columns] = {
    "time per step": {
        "median s / step": lambda one: one.rows[0].get("skipped") or median(one.every("seconds"), 3),
        "tokens/s": _if_fitting(lambda one: f"{tokens(one.rows[0]) / statistics.fmean(one.every('seconds')):.0f}"),
        "median, of none": _if_fitting(median_of_base),
        "all steps, of none": _if_fitting(sum_of_base),
    },
    "memory of a device": {
        "peak, GB": _if_fitting(lambda one: f"{max(row['peak_bytes'] for row in one.rows) / 1e9:.2f}"),
        "in the paper, GB": _paper,
        "state on device, MB": _if_fitting(lambda one: state_bytes(one, "device")),
        "state on host, MB": _if_fitting(lambda one: state_bytes(one, "host")),
    },
}
