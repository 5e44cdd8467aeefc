# SPDX-License-Identifier: Apache-2.0
"""What the cpu suite is to reach, and whether it does."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.row_groups import RowGroup, Setting, above_imports, group_rows, live_peak, step_seconds
from benchmarks.report.table import median_range, table

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio of grass in a setting that is to be at most ``most``; ``ratios``: one value per round."""

    label: str
    setting: Setting
    most: float
    ratios: Callable[[RowGroup], list[float]]


ZERO1, ZERO2, ZERO3 = (Setting("grass", stage) for stage in (1, 2, 3))
ON_DEVICE, ALL_STATE = ZERO2._replace(offload="none"), ZERO2._replace(prepare_state=True)


def targets(memory_ratio: Callable[[Row], float]) -> tuple[Target, ...]:
    """``memory_ratio``: peak of live tensors over the cost model's."""
    return (
        Target("time, of full on ZeRO-2", ZERO2, 0.35, lambda one: one.ratios("full", 2, step_seconds)),
        Target("time, of LoRA r=128", ZERO2, 0.52, lambda one: one.ratios("lora", 2, step_seconds)),
        Target("time, of full on ZeRO-3", ZERO3, 0.45, lambda one: one.ratios("full", 3, step_seconds)),
        Target("live tensors, of LoRA r=128", ZERO2, 1.0, lambda one: one.ratios("lora", 2, live_peak)),
        Target("live tensors, of LoRA r=128", ON_DEVICE, 1.0, lambda one: one.ratios("lora", 2, live_peak)),
        Target("RSS above imports, of LoRA r=128", ZERO2, 1.0, lambda one: one.ratios("lora", 2, above_imports)),
        Target("RSS above imports, of LoRA r=128", ALL_STATE, 1.0, lambda one: one.ratios("lora", 2, above_imports)),
        *(
            Target("live tensors, of the cost model", one, 1.1, lambda group: group.values(memory_ratio))
            for one in (ZERO1, ZERO2, ZERO3)
        ),
    )


def target_table(rows: Sequence[Row], memory_ratio: Callable[[Row], float]) -> str:
    """A line per target that was measured; the median of the rounds decides."""
    groups = {one.setting: one for one in group_rows(rows)}
    lines = [
        (target, values)
        for target in targets(memory_ratio)
        if target.setting in groups and (values := target.ratios(groups[target.setting]))
    ]
    return table(
        "Targets of grass",
        lines,
        {
            "target": lambda line: line[0].label,
            "setting": lambda line: line[0].setting.label,
            "ZeRO": lambda line: str(line[0].setting.stage),
            "at most": lambda line: f"{line[0].most:.2f}",
            "measured": lambda line: median_range(line[1]),
            "result": lambda line: "met" if statistics.median(line[1]) <= line[0].most else "**missed**",
        },
    )
