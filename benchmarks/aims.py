# SPDX-License-Identifier: Apache-2.0
"""What the cpu suite was to reach, and whether it did."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.costs import above_imports, floor_ratios, live_peak
from benchmarks.lineup import Setting, compared, ratios, setting, spread, step_seconds
from benchmarks.places import header, line

Row = dict[str, Any]


@dataclass(frozen=True)
class Aim:
    """A ratio of grass, set as in ``of``, that is to be at most ``most``; ``values``: its rows, all rows -> one value per round."""

    label: str
    of: Setting
    most: float
    values: Callable[[Sequence[Row], Sequence[Row]], list[float]]


def _against(
    method: str, stage: int, measure: Callable[[Row], float]
) -> Callable[[Sequence[Row], Sequence[Row]], list[float]]:
    return lambda mine, rows: ratios(mine, compared(rows), method, stage, measure)


ZERO1, ZERO2, ZERO3 = (Setting("grass", stage) for stage in (1, 2, 3))
AIMS = (
    Aim("time of stock full fine-tuning's, ZeRO-2", ZERO2, 0.35, _against("full", 2, step_seconds)),
    Aim("time of LoRA r=128's, ZeRO-2", ZERO2, 0.52, _against("lora", 2, step_seconds)),
    Aim("time of stock full fine-tuning's, ZeRO-3", ZERO3, 0.45, _against("full", 3, step_seconds)),
    Aim("peak of live tensors of LoRA r=128's, ZeRO-2", ZERO2, 1.0, _against("lora", 2, live_peak)),
    Aim(
        "the same with offload `none`, which adds the Adam state of the layers drawn so far, not yet of all",
        ZERO2._replace(offload="none"),
        1.0,
        _against("lora", 2, live_peak),
    ),
    Aim("peak RSS above the imports of LoRA r=128's, ZeRO-2", ZERO2, 1.0, _against("lora", 2, above_imports)),
    Aim(
        "the same, Adam state of all layers in host memory",
        ZERO2._replace(prepare_state=True),
        1.0,
        _against("lora", 2, above_imports),
    ),
    *(
        Aim(
            f"peak of live tensors of its floor, ZeRO-{one.stage}{', weights that DeepSpeed keeps gathered among it' if one.stage == 3 else ''}",
            one,
            1.1,
            lambda mine, rows: floor_ratios("memory", mine),
        )
        for one in (ZERO1, ZERO2, ZERO3)
    ),
)


def aims_table(rows: Sequence[Row]) -> list[str]:
    """One line per aim that was measured: the median of the rounds decides."""
    lines = header("aim of grass: a step's", "at most", "measured", "")
    for aim in AIMS:
        mine = [row for row in compared(rows) if setting(row) == aim.of]
        values = aim.values(mine, rows)
        if values:
            met = "met" if statistics.median(values) <= aim.most else "**missed**"
            lines.append(line([aim.label, f"{aim.most:.2f}", spread(values), met]))
    return lines
