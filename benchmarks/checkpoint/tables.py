# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``checkpoint``."""

from benchmarks.case import Row
from benchmarks.checkpoint.suite import WAYS
from benchmarks.report.row_groups import RowGroup, Setting
from benchmarks.report.table import Columns, conditions, median, median_range, table


def tables(rows: list[Row]) -> list[str]:
    """Medians over rounds; ratios to stock DeepSpeed within a round."""
    names = {"checkpoint": lambda line: line[0], "ZeRO": lambda line: str(line[1].setting.stage)}
    blocks = [table(f"Checkpoints: {title}", lines(rows), names, columns) for title, columns in TABLES.items()]
    return ["## Checkpoints", conditions(rows, f"{len({row['seed'] for row in rows})} interleaved rounds"), *blocks]


def lines(rows: list[Row]) -> list[tuple[str, RowGroup]]:
    """Per stage and way to save, its label and its rows."""
    found = []
    for stage in sorted({row["stage"] for row in rows}):
        for label, way in WAYS.items():
            wanted = (stage, way.method, way.prepare_state, way.async_save)
            mine = [r for r in rows if (r["stage"], r["method"], r["prepare_state"], r["async"]) == wanted]
            if mine:
                found.append((label, RowGroup(Setting(way.method, stage), mine, rows)))
    return found


def _values(line: tuple[str, RowGroup], name: str) -> list[float]:
    return line[1].values(lambda row: row[name])


def _of_stock(line: tuple[str, RowGroup], name: str) -> list[float]:
    return line[1].ratios("full", line[1].setting.stage, lambda row: row[name])


TABLES: dict[str, Columns] = {
    "size": {
        "all files, MB": lambda line: median(_values(line, "checkpoint_bytes"), 0, 1e-6),
        "of stock": lambda line: median(_of_stock(line, "checkpoint_bytes")),
    },
    "time": {
        "stall, s": lambda line: median(_values(line, "stall_seconds")),
        "of stock": lambda line: median_range(_of_stock(line, "stall_seconds")),
        "until on disk, s": lambda line: median(_values(line, "disk_seconds")),
        "s / step before": lambda line: median(line[1].every("step_seconds")),
        "meanwhile": lambda line: median(line[1].every("seconds_meanwhile")),
    },
}
