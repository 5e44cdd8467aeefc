# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``checkpoint``."""

from dataclasses import dataclass
from typing import Any

from benchmarks.checkpoint.suite import WAYS
from benchmarks.report.table import conditions, median, median_range, table

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """The rows of a way to save, beside those of stock DeepSpeed in the same rounds."""

    label: str
    stage: int
    rows: list[Row]
    stock: list[Row]

    def values(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]

    def ratios(self, name: str) -> list[float]:
        return [row[name] / stock[name] for row, stock in zip(self.rows, self.stock, strict=True)]

    def every(self, name: str) -> list[float]:
        return [value for row in self.rows for value in row.get(name, [])]


def lines(rows: list[Row]) -> list[Line]:
    """Per stage and way; rounds without stock DeepSpeed are left out."""
    found = []
    for stage in sorted({row["stage"] for row in rows}):
        stock = {row["seed"]: row for row in rows if row["stage"] == stage and row["method"] == "full"}
        for label, way in WAYS.items():
            wanted = (stage, way.method, way.prepare_state, way.async_save)
            mine = [
                row
                for row in rows
                if (row["stage"], row["method"], row["prepare_state"], row["async"]) == wanted and row["seed"] in stock
            ]
            if mine:
                found.append(Line(label, stage, mine, [stock[row["seed"]] for row in mine]))
    return found


def tables(rows: list[Row]) -> list[str]:
    """Medians over rounds; ratios to stock DeepSpeed within a round."""
    if not rows:
        return []
    names = {"checkpoint": lambda one: one.label, "ZeRO": lambda one: str(one.stage)}
    size = {
        **names,
        "all files, MB": lambda one: median(one.values("checkpoint_bytes"), 0, 1e-6),
        "of stock": lambda one: median(one.ratios("checkpoint_bytes")),
    }
    seconds = {
        **names,
        "stall, s": lambda one: median(one.values("stall_seconds")),
        "of stock": lambda one: median_range(one.ratios("stall_seconds")),
        "until on disk, s": lambda one: median(one.values("disk_seconds")),
        "s / step before": lambda one: median(one.every("step_seconds")),
        "meanwhile": lambda one: median(one.every("seconds_meanwhile")),
    }
    found = lines(rows)
    return [
        "## Checkpoints",
        conditions(rows, f"{len({row['seed'] for row in rows})} interleaved rounds"),
        table("Checkpoints: size", found, size),
        table("Checkpoints: time", found, seconds),
    ]
