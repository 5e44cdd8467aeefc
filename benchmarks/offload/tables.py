# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``offload``: time against state on the device, memory, and bytes through the disk."""

import statistics
from functools import partial

from benchmarks.case import Row
from benchmarks.offload.suite import BASE
from benchmarks.report.row_groups import RowGroup, group_rows
from benchmarks.report.table import Columns, conditions, each, median, table


def tables(rows: list[Row]) -> list[str]:
    periods = sorted({row["grass"]["sample_period"] for row in rows})
    text = (
        f"{each(rows, 'steps')} steps in each of {len({row['seed'] for row in rows})} interleaved rounds, "
        f"a draw every {', '.join(map(str, periods))}"
    )
    names = {"`offload`": lambda one: one.setting.offload}
    blocks = [table(f"Offload: {title}", group_rows(rows), names, columns) for title, columns in TABLES.items()]
    return ["## Offload of optimizer state", conditions(rows, text), *blocks]


def state_bytes(one: RowGroup, device: str) -> str:
    """MB of optimizer state; the peak of what is on the device."""
    return f"{one.rows[0]['bytes']['optimizer_state'].get(device, 0) / 1e6:.1f}"


def base_pairs(one: RowGroup) -> list[tuple[Row, Row]]:
    """Each row with that of state on the device in the same round.

    Raises:
        ValueError: they trained other layers. A step costs what its layers cost, so such steps do not compare.
    """
    pairs = [both for both in one.pairs(one.setting.method, one.setting.stage, BASE) if "skipped" not in both[1]]
    for row, base in pairs:
        if row["active"] != base["active"]:
            raise ValueError(f"{row['offload']} and {BASE} trained different layers with seed {row['seed']}: no ratio")
    return pairs


def median_of_base(one: RowGroup) -> str:
    """Ratio of the median step, with the least and the largest median of a round."""
    rounds = [
        [mine / other for mine, other in zip(row["seconds"], base["seconds"], strict=True)]
        for row, base in base_pairs(one)
    ]
    if not rounds:
        return ""
    medians = [statistics.median(ratios) for ratios in rounds]
    every_step = statistics.median(ratio for ratios in rounds for ratio in ratios)
    return f"{every_step:.3f} ({min(medians):.3f} to {max(medians):.3f})"


def sum_of_base(one: RowGroup) -> str:
    """Ratio of the sums of all steps, draws included."""
    pairs = base_pairs(one)
    mine, base = (sum(sum(both[side]["seconds"]) for both in pairs) for side in (0, 1))
    return f"{mine / base:.3f}" if pairs else ""


def _added(one: RowGroup, share: bool) -> str:
    """Mean ms that ``step()`` takes beyond the same steps of the base; ``share``: of a whole step there."""
    if one.setting.offload == BASE or not (pairs := base_pairs(one)):
        return ""
    mean = statistics.mean
    seconds = mean(mean(row["step_seconds"]) - mean(base["step_seconds"]) for row, base in pairs)
    return (
        f"{seconds / mean(mean(base['seconds']) for _, base in pairs):+.1%}" if share else f"{1e3 * seconds:+.0f} ms"
    )


def _per_step(one: RowGroup, direction: str) -> str:
    moved = sum(row["disk_bytes"][direction] for row in one.rows)
    return f"{moved / sum(row['steps'] for row in one.rows) / 1e6:.1f}"


TABLES: dict[str, Columns] = {
    "time per step": {
        "median s / step": lambda one: median(one.every("seconds"), 3),
        "mean": lambda one: f"{statistics.fmean(one.every('seconds')):.3f}",
        "median, of none": median_of_base,
        "all steps, of none": sum_of_base,
    },
    "time in `step()`": {
        "median ms": lambda one: median(one.every("step_seconds"), 0, 1e3),
        "mean, above none": partial(_added, share=False),
        "of a step": partial(_added, share=True),
    },
    "memory of a rank": {
        "RSS, GB": lambda one: median(one.values(lambda row: row["resident_bytes"]), 2, 1e-9),
        "peak RSS, GB": lambda one: median(one.values(lambda row: row["peak_bytes"]), 2, 1e-9),
        **{f"state on {device}, MB": partial(state_bytes, device=device) for device in ("device", "host", "nvme")},
    },
    "disk traffic of a rank": {
        f"{direction} per step, MB": partial(_per_step, direction=direction) for direction in ("read", "written")
    },
}
