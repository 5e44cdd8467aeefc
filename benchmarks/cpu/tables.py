# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``cpu``. ``README.md`` says how to read them."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import cost_model
from benchmarks.cost_model import TrainedStep, wire_bytes
from benchmarks.cpu.growth import REFERENCE, growth_tables
from benchmarks.cpu.targets import target_table
from benchmarks.measure.engine import PARTS
from benchmarks.methods import METHODS
from benchmarks.models import RANDOM, random_shape
from benchmarks.report.row_groups import (
    RowGroup,
    above_imports,
    group_rows,
    host_state,
    live_peak,
    memory_ratio,
    step_seconds,
)
from benchmarks.report.table import conditions, each, mean, median, median_range, table
from grass_ds.config import GrassConfig

Row = dict[str, Any]
NAMES = {"method": lambda one: one.setting.label, "ZeRO": lambda one: str(one.setting.stage)}
# Optimizer steps of the run whose share of probing is shown.
RUN = 1000
GROWING = "Llama with random weights: " + ", ".join(
    f"{name} {n}" for name, n in {**random_shape(RANDOM), **REFERENCE}.items()
)


def tables(rows: list[Row]) -> list[str]:
    """All tables: of the real model, and of random shapes that grow."""
    cost = [row for row in rows if not row["model"].startswith(RANDOM)]
    growing = [row for row in rows if row["model"].startswith(RANDOM)]
    blocks = []
    if cost:
        groups = group_rows(cost)
        blocks += ["## Cost of a step", conditions(cost, _draws(cost)), target_table(cost)]
        blocks += [*time_tables(groups), *memory_tables(groups), *model_tables(groups), check_table(groups)]
    if growing:
        blocks += ["## How cost grows", conditions(growing, model=GROWING), *growth_tables(growing)]
    return blocks


def _draws(rows: Sequence[Row]) -> str:
    ours = [row for row in rows if METHODS[row["method"]].grass is not None]
    periods = {f"{row['grass']['sample_period']} steps on ZeRO-{row['stage']}" for row in ours}
    temperatures = [row for row in rows if row["temperature"] is not None]
    return (
        f"a draw every {', '.join(sorted(periods))}; temperature {each(temperatures, 'temperature')}" if ours else ""
    )


# ---- time ----------------------------------------------------------------------------------------------------------


def time_tables(groups: list[RowGroup]) -> list[str]:
    """Seconds of a step, of its parts, and what switching and probing add."""
    seconds = table(
        "Time per step",
        groups,
        {
            **NAMES,
            "s / step": lambda one: median_range(one.values(step_seconds)),
            "of full, ZeRO-2": lambda one: median_range(one.ratios("full", 2, step_seconds)),
            "of LoRA r=128": lambda one: median_range(one.ratios("lora", 2, step_seconds)),
            "tokens/s": lambda one: f"{_tokens(one.rows[0]) / statistics.median(one.values(step_seconds)):.0f}",
        },
    )
    parts = table(
        "Parts of a step, seconds",
        groups,
        {
            **NAMES,
            "forward": lambda one: mean(one.every("forward_seconds")),
            "backward": lambda one: mean(one.every("backward_seconds")),
            "`step()`": lambda one: mean(one.every("step_seconds")),
            "lowest layer trained": _lowest_layer,
        },
    )
    switching = table(
        "Switching and probing",
        [one for one in groups if one.every("probe_seconds") or any(map(after_switch, one.rows))],
        {
            **NAMES,
            "step after a switch, of the others": lambda one: median_range(
                [ratio for row in one.rows for ratio in after_switch(row)]
            ),
            "s / probing step": lambda one: median(one.every("probe_seconds")),
            f"share of a run of {RUN}": _probing_share,
        },
    )
    return [seconds, parts, switching]


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


def _tokens(row: Row) -> int:
    """Tokens of an optimizer step, all ranks."""
    return row["ranks"] * row["micro_batch"] * row["accumulation"] * row["sequence"]


def _lowest_layer(one: RowGroup) -> str:
    """Mean over steps; backward runs down to it."""
    if METHODS[one.setting.method].grass is None:
        return ""
    return mean([TrainedStep(row, active).lowest for row in one.rows for active in row["active"] if active], 1)


def _probing_share(one: RowGroup) -> str:
    probing = one.every("probe_seconds")
    if not probing:
        return ""
    steps = GrassConfig().probe_steps
    spent = steps * statistics.median(probing)
    return f"{spent / (spent + (RUN - steps) * statistics.median(one.values(step_seconds))):.1%}"


# ---- memory and traffic --------------------------------------------------------------------------------------------


def memory_tables(groups: list[RowGroup]) -> list[str]:
    """Memory of the process, memory of tensors, and what crosses ranks."""

    def observed(one: RowGroup, name: str) -> str:
        return median([row["observed"][name] for row in one.rows], 0, 1e-6)

    process = table(
        "Memory of a process, GB",
        groups,
        {
            **NAMES,
            "peak RSS": lambda one: median(one.values(lambda row: row["peak_bytes"] / 1e9)),
            "while training, above imports": lambda one: median_range(
                one.values(lambda row: above_imports(row) / 1e9)
            ),
            "of LoRA r=128": lambda one: median_range(one.ratios("lora", 2, above_imports)),
            "Adam state in the end": lambda one: f"{state / 1e9:.2f}" if (state := host_state(one.rows[0])) else "",
        },
    )
    live = table(
        "Live tensors of a rank, MB",
        groups,
        {
            **NAMES,
            "at rest": lambda one: observed(one, "rest_bytes"),
            "peak": lambda one: observed(one, "peak_bytes"),
            "peak, of LoRA r=128": lambda one: median_range(one.ratios("lora", 2, live_peak)),
            "weights trained, M": lambda one: f"{one.rows[0]['trainable'] / 1e6:.1f}",
        },
    )
    traffic = table(
        "Traffic of a rank per step",
        groups,
        {
            **NAMES,
            "sent, MB": lambda one: median([wire_bytes(row["observed"]["traffic"]) for row in one.rows], 1, 1e-6),
            "collectives": lambda one: median([sum(row["observed"]["calls"].values()) for row in one.rows], 0),
        },
    )
    return [process, live, traffic]


# ---- against the cost model ----------------------------------------------------------------------------------------


def _flops_ratio(row: Row) -> float:
    return row["observed"]["flops"] / cost_model.flops(row, row["observed"]["active"])


def _traffic_ratio(row: Row) -> float:
    return wire_bytes(row["observed"]["traffic"]) / wire_bytes(cost_model.traffic(row, row["observed"]["active"]))


def _time_ratio(row: Row) -> float:
    return sum(row["seconds"]) / sum(sum(parts.values()) for parts in cost_model.seconds(row))


def model_tables(groups: list[RowGroup]) -> list[str]:
    """Measured over the least that the algorithm needs, and seconds beyond it."""
    ratios = table(
        "Measured, of the cost model",
        groups,
        {
            **NAMES,
            "FLOPs": lambda one: median_range(one.values(_flops_ratio)),
            "traffic": lambda one: median_range(one.values(_traffic_ratio)),
            "memory": lambda one: median_range(one.values(memory_ratio)),
            "time": lambda one: median_range([_time_ratio(row) for row in one.rows if "plain" in row]),
        },
    )
    above = table(
        "Seconds above plain PyTorch",
        [one for one in groups if _plain(one)],
        {
            **NAMES,
            **{part: lambda one, part=part: f"{_above_plain(one, part):+.2f}" for part in PARTS},
            "least seconds of traffic": lambda one: mean(parts["traffic"] for parts in _plain(one)),
        },
    )
    return [ratios, above]


def _plain(one: RowGroup) -> list[dict[str, float]]:
    """The least seconds of every measured step."""
    return [parts for row in one.rows if "plain" in row for parts in cost_model.seconds(row)]


def _above_plain(one: RowGroup, part: str) -> float:
    """Mean seconds of a part of the step beyond the least; traffic may be in any of them."""
    measured = [value for row in one.rows if "plain" in row for value in row[f"{part}_seconds"]]
    least = [parts["adam" if part == "step" else part] for parts in _plain(one)]
    return statistics.fmean(measured) - statistics.fmean(least)


# ---- methods of others ---------------------------------------------------------------------------------------------


def check_table(groups: list[RowGroup]) -> str:
    """Whether the steps of methods that freeze by ``requires_grad`` trained what they are to train."""
    return table(
        "What steps of others' methods changed",
        [one for one in groups if any(value is not None for value in one.every("changed"))],
        {
            **NAMES,
            "measured steps": lambda one: str(len(one.every("changed"))),
            "steps that changed no weight": lambda one: str(one.every("changed").count(False)),
            "frozen layers that moved": lambda one: median_range(one.every("moved_frozen"), 0),
        },
    )
