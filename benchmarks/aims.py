# SPDX-License-Identifier: Apache-2.0
"""What the cpu suite was to reach, and whether it did."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.costs import above_imports, floor_ratios, live_peak
from benchmarks.lineup import Setting, of_kind, ratios, setting, spread, step_seconds
from benchmarks.places import header, line

Row = dict[str, Any]


@dataclass(frozen=True)
class Aim:
    """A ratio of grass on ``stage`` that is to be at most ``most``; ``values``: grass's rows, all rows -> one value per round."""

    label: str
    stage: int
    most: float
    values: Callable[[Sequence[Row], Sequence[Row]], list[float]]


def _against(
    method: str, stage: int, measure: Callable[[Row], float]
) -> Callable[[Sequence[Row], Sequence[Row]], list[float]]:
    return lambda mine, rows: ratios(mine, of_kind(rows, "cost"), method, stage, measure)


AIMS = (
    Aim("time of stock full fine-tuning's, ZeRO-2", 2, 0.35, _against("full", 2, step_seconds)),
    Aim("time of LoRA r=128's, ZeRO-2", 2, 0.52, _against("lora", 2, step_seconds)),
    Aim("time of stock full fine-tuning's, ZeRO-3", 3, 0.45, _against("full", 3, step_seconds)),
    Aim(
        "peak RSS of LoRA r=128's, ZeRO-2, with Adam state of the layers drawn so far",
        2,
        1.0,
        _against("lora", 2, lambda row: row["train_peak_bytes"]),
    ),
    Aim("the same above the imports", 2, 1.0, _against("lora", 2, above_imports)),
    Aim("peak of live tensors of LoRA r=128's, ZeRO-2", 2, 1.0, _against("lora", 2, live_peak)),
    *(
        Aim(
            f"peak of live tensors of its floor, ZeRO-{stage}",
            stage,
            1.1,
            lambda mine, rows: floor_ratios("memory", mine, rows),
        )
        for stage in (1, 2, 3)
    ),
)


def aims_table(rows: Sequence[Row]) -> list[str]:
    """One line per aim that was measured: the median of the rounds decides."""
    lines = header("aim of grass: a step's", "at most", "measured", "")
    for aim in AIMS:
        mine = [row for row in of_kind(rows, "cost") if setting(row) == Setting("grass", aim.stage)]
        values = aim.values(mine, rows)
        if values:
            met = "met" if statistics.median(values) <= aim.most else "**missed**"
            lines.append(line([aim.label, f"{aim.most:.2f}", spread(values), met]))
    return lines
