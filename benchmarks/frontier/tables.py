# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``frontier``."""

import statistics
from collections.abc import Sequence

from benchmarks import cost_model
from benchmarks.case import Row
from benchmarks.frontier.suite import TUNING_SEED, Plan, Setting, setting
from benchmarks.quality.suite import STEPS
from benchmarks.report.table import Columns, conditions, mean, mean_deviation, median, table

PICTURE = "![test loss over device memory, and over FLOPs](plots/frontier.png)"
NAMES: Columns = {
    "method": lambda one: one.method,
    "layers": lambda one: "" if one.gamma is None else str(one.gamma),
    "expansion": lambda one: (
        f"{one.expansion:.3g}{' from layer 0' if one.depth == 0 else ''}" if one.expansion else ""
    ),
}


def tables(rows: list[Row]) -> list[str]:
    text = f"task `arithmetic`, {STEPS} steps; {rows[0]['dev_rows']} development rows"
    return ["## Frontier", conditions(rows, text), rates(rows), results(rows)]


def rates(rows: Sequence[Row]) -> str:
    """Development loss per setting and learning rate; the least is bold once its neighbours are worse."""
    plan = Plan(rows)
    found = {one: plan.tried(one) for one in dict.fromkeys(one for one, _ in plan.tuning)}

    def cell(one: Setting, lr: float) -> str:
        text = f"{found[one][lr]:.3f}" if lr in found[one] else ""
        return f"**{text}**" if plan.settled.get(one) == lr else text

    columns = {
        f"{lr:.3g}": lambda one, lr=lr: cell(one, lr) for lr in sorted({lr for by in found.values() for lr in by})
    }
    return table(f"Development loss by learning rate, seed {TUNING_SEED}", found, NAMES, columns)


def results(rows: Sequence[Row]) -> str:
    """Losses and costs at the best rate, with their picture."""
    if not (found := reported(rows)):
        return ""
    columns = {
        "lr": lambda one: f"{found[one][0]['lr']:.3g}",
        "test loss": lambda one: mean_deviation([row["test_loss"] for row in found[one]]),
        "development loss": lambda one: mean_deviation([row["dev_loss"] for row in found[one]]),
        "seeds": lambda one: str(len(found[one])),
        "TFLOP / step": lambda one: mean(map(tflop, found[one])),
        "device memory in bf16, GB": lambda one: median([device_bytes(row) for row in found[one]], 2, 1e-9),
        "peak RSS, GB": lambda one: median([row["peak_bytes"] for row in found[one]], 2, 1e-9),
        "weights with a gradient, M": lambda one: mean((row["trainable"] / 1e6 for row in found[one]), 1),
    }
    return f"{table('Loss and cost', found, NAMES, columns)}\n\n{PICTURE}"


def reported(rows: Sequence[Row]) -> dict[Setting, list[Row]]:
    """The rows of all seeds of each setting that is settled and has some."""
    measured = [row for row in rows if "test_loss" in row]
    return {one: mine for one in Plan(rows).settled if (mine := [row for row in measured if setting(row) == one])}


def tflop(row: Row) -> float:
    """10^12 floating-point operations of a step by the cost model, mean over the steps, probing included."""
    active = row["active"] or [None]
    return statistics.fmean(cost_model.flops(row, layers) for layers in active) / 1e12


def device_bytes(row: Row) -> float:
    """By the cost model at the peak of the run, as if it had been in bf16, which takes less than fp32."""
    row = {**row, "dtype": "bf16"}
    active = [layers for layers in row["active"] if layers] or [None]
    return max(cost_model.memory(row, layers)["total"] for layers in active)
