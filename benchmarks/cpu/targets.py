# SPDX-License-Identifier: Apache-2.0
"""What the cpu suite is to reach, and whether it does."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.report.row_groups import (
    Measure,
    RowGroup,
    Setting,
    above_imports,
    group_rows,
    live_peak,
    memory_ratio,
    step_seconds,
)
from benchmarks.report.table import median_range, table

Row = dict[str, Any]
ZERO1, ZERO2, ZERO3 = (Setting("grass", stage) for stage in (1, 2, 3))


class Target(NamedTuple):
    """A measure of grass in a setting, over that of method and stage ``of`` if given, is to be at most ``most``."""

    label: str
    setting: Setting
    most: float
    measure: Measure
    of: tuple[str, int] | None = None

    def values(self, group: RowGroup) -> list[float]:
        """One value per round."""
        return group.values(self.measure) if self.of is None else group.ratios(*self.of, self.measure)


LORA = ("lora", 2)
TARGETS = (
    Target("time, of full on ZeRO-2", ZERO2, 0.35, step_seconds, ("full", 2)),
    Target("time, of LoRA r=128", ZERO2, 0.52, step_seconds, LORA),
    Target("time, of full on ZeRO-3", ZERO3, 0.45, step_seconds, ("full", 3)),
    Target("live tensors, of LoRA r=128", ZERO2, 1.0, live_peak, LORA),
    Target("live tensors, of LoRA r=128", ZERO2._replace(offload="none"), 1.0, live_peak, LORA),
    Target("RSS above imports, of LoRA r=128", ZERO2, 1.0, above_imports, LORA),
    Target("RSS above imports, of LoRA r=128", ZERO2._replace(prepare_state=True), 1.0, above_imports, LORA),
    *(Target("live tensors, of the cost model", one, 1.1, memory_ratio) for one in (ZERO1, ZERO2, ZERO3)),
)


def target_table(rows: Sequence[Row]) -> str:
    """A line per target that was measured; the median of the rounds decides."""
    groups = {one.setting: one for one in group_rows(rows)}
    found = [(target, target.values(groups[target.setting])) for target in TARGETS if target.setting in groups]
    return table(
        "Targets of grass",
        [(target, values) for target, values in found if values],
        {
            "target": lambda line: line[0].label,
            "setting": lambda line: line[0].setting.label,
            "ZeRO": lambda line: str(line[0].setting.stage),
            "at most": lambda line: f"{line[0].most:.2f}",
            "measured": lambda line: median_range(line[1]),
            "result": lambda line: "met" if statistics.median(line[1]) <= line[0].most else "**missed**",
        },
    )
