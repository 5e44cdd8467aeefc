# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``cpu``. ``README.md`` says how to read them."""

import statistics
from collections.abc import Sequence

from benchmarks import cost_model
from benchmarks.case import Row
from benchmarks.cost_model import TrainedStep, wire_bytes
from benchmarks.measure.engine import PARTS
from benchmarks.methods import METHODS
from benchmarks.report.row_groups import (
    RowGroup,
    above_imports,
    group_rows,
    host_state,
    live_peak,
    memory_ratio,
    step_seconds,
    tokens,
)
from benchmarks.report.table import Columns, conditions, each, mean, median, median_range, table
from grass_ds.config import GrassConfig

NAMES: Columns = {"method": lambda one: one.setting.label, "ZeRO": lambda one: str(one.setting.stage)}
# Optimizer steps of the run whose share of probing is shown.
RUN = 1000


def tables(rows: list[Row]) -> list[str]:
    groups = group_rows(rows)
    blocks = [table(title, groups, NAMES, columns) for title, columns in TABLES.items()]
    return ["## Cost of a step", conditions(rows, _draws(rows)), *blocks]


def _draws(rows: Sequence[Row]) -> str:
    periods = {
        f"{row['grass']['sample_period']} steps on ZeRO-{row['stage']}" for row in rows if METHODS[row["method"]].grass
    }
    temperatures = [row for row in rows if row["temperature"] is not None]
    return f"a draw every {', '.join(sorted(periods))}; temperature {each(temperatures, 'temperature')}"


def after_switch(row: Row) -> list[float]:
    """Seconds of each step with newly drawn layers over the median of the following steps with the same."""
    active, seconds, found = row["active"], row["seconds"], []
    for begin in range(1, len(active)):
        if active[begin] is None or active[begin] == active[begin - 1]:
            continue
        end = next((i for i in range(begin, len(active)) if active[i] != active[begin]), len(active))
        if end - begin > 1:
            found.append(seconds[begin] / statistics.median(seconds[begin + 1 : end]))
    return found


def _lowest_layer(one: RowGroup) -> str:
    """Mean over steps; backward runs down to it."""
    if METHODS[one.setting.method].grass is None:
        return ""
    return mean((TrainedStep(row, active).lowest for row in one.rows for active in row["active"] if active), 1)


def _probing_share(one: RowGroup) -> str:
    if not (probing := one.every("probe_seconds")):
        return ""
    steps = GrassConfig().probe_steps
    spent = steps * statistics.median(probing)
    return f"{spent / (spent + (RUN - steps) * statistics.median(one.values(step_seconds))):.1%}"


def _flops_ratio(row: Row) -> float:
    return row["observed"]["flops"] / cost_model.flops(row, row["observed"]["active"])


def _traffic_ratio(row: Row) -> float:
    return wire_bytes(row["observed"]["traffic"]) / wire_bytes(cost_model.traffic(row, row["observed"]["active"]))


def _time_ratio(row: Row) -> float:
    return sum(row["seconds"]) / sum(sum(parts.values()) for parts in cost_model.seconds(row))


def _plain(one: RowGroup) -> list[dict[str, float]]:
    """The least seconds of every measured step, where plain PyTorch was timed."""
    return [parts for row in one.rows if "plain" in row for parts in cost_model.seconds(row)]


def _above_plain(one: RowGroup, part: str) -> str:
    """Mean seconds of a part of the step beyond the least; traffic may be in any of them."""
    if not (least := [parts["adam" if part == "step" else part] for parts in _plain(one)]):
        return ""
    measured = [value for row in one.rows if "plain" in row for value in row[f"{part}_seconds"]]
    return f"{statistics.fmean(measured) - statistics.fmean(least):+.2f}"


TABLES: dict[str, Columns] = {
    "Time per step": {
        "s / step": lambda one: median_range(one.values(step_seconds)),
        "of full, ZeRO-2": lambda one: median_range(one.ratios("full", 2, step_seconds)),
        "of LoRA r=128": lambda one: median_range(one.ratios("lora", 2, step_seconds)),
        "tokens/s": lambda one: f"{tokens(one.rows[0]) / statistics.median(one.values(step_seconds)):.0f}",
    },
    "Parts of a step, seconds": {
        "forward": lambda one: mean(one.every("forward_seconds")),
        "backward": lambda one: mean(one.every("backward_seconds")),
        "`step()`": lambda one: mean(one.every("step_seconds")),
        "lowest layer trained": _lowest_layer,
    },
    "Switching and probing": {
        "step after a switch, of the others": lambda one: median_range(
            [ratio for row in one.rows for ratio in after_switch(row)]
        ),
        "s / probing step": lambda one: median(one.every("probe_seconds")),
        f"share of a run of {RUN}": _probing_share,
    },
    "Memory of a process, GB": {
        "peak RSS": lambda one: median(one.values(lambda row: row["peak_bytes"] / 1e9)),
        "while training, above imports": lambda one: median_range(one.values(lambda row: above_imports(row) / 1e9)),
        "of LoRA r=128": lambda one: median_range(one.ratios("lora", 2, above_imports)),
        "Adam state in the end": lambda one: f"{state / 1e9:.2f}" if (state := host_state(one.rows[0])) else "",
    },
    "Live tensors of a rank, MB": {
        "at rest": lambda one: median(one.values(lambda row: row["observed"]["rest_bytes"]), 0, 1e-6),
        "peak": lambda one: median(one.values(live_peak), 0, 1e-6),
        "peak, of LoRA r=128": lambda one: median_range(one.ratios("lora", 2, live_peak)),
        "weights trained, M": lambda one: f"{one.rows[0]['trainable'] / 1e6:.1f}",
    },
    "Traffic of a rank per step": {
        "sent, MB": lambda one: median(one.values(lambda row: wire_bytes(row["observed"]["traffic"])), 1, 1e-6),
        "collectives": lambda one: median(one.values(lambda row: sum(row["observed"]["calls"].values())), 0),
    },
    "Measured, of the cost model": {
        "FLOPs": lambda one: median_range(one.values(_flops_ratio)),
        "traffic": lambda one: median_range(one.values(_traffic_ratio)),
        "memory": lambda one: median_range(one.values(memory_ratio)),
        "time": lambda one: median_range([_time_ratio(row) for row in one.rows if "plain" in row]),
    },
    "Seconds above plain PyTorch": {
        **{part: lambda one, part=part: _above_plain(one, part) for part in PARTS},
        "least seconds of traffic": lambda one: mean(parts["traffic"] for parts in _plain(one)),
    },
}
