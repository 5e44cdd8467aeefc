# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``frontier``."""

from collections.abc import Sequence

from benchmarks.case import Row
from benchmarks.frontier.suite import ADAM, TUNING_SEED, Setting, setting, tried_rates, with_expansion
from benchmarks.quality.suite import STEPS
from benchmarks.report.table import conditions, mean, mean_deviation, median, table

NAMES = {
    "method": lambda one: one.method,
    "layers": lambda one: "" if one.gamma is None else str(one.gamma),
    "expansion": lambda one: f"{one.expansion:g}" if one.expansion else "",
}


def tables(rows: list[Row]) -> list[str]:
    known = (*ADAM, *with_expansion(rows))
    text = f"task `arithmetic`, {STEPS} steps; {rows[0]['dev_rows']} development rows"
    return ["## Frontier", conditions(rows, text), rates(rows, known), results(rows, known)]


def rates(rows: Sequence[Row], known: Sequence[Setting]) -> str:
    """Development loss per setting and learning rate."""
    found = {one: tried_rates(one, rows) for one in known}
    every = sorted({lr for losses in found.values() for lr in losses})

    def cell(one: Setting, lr: float) -> str:
        if lr not in found[one]:
            return ""
        text = f"{found[one][lr]:.3f}"
        return f"**{text}**" if found[one][lr] == min(found[one].values()) else text

    columns = {f"{lr:.3g}": lambda one, lr=lr: cell(one, lr) for lr in every}
    return table(f"Development loss by learning rate, seed {TUNING_SEED}", known, NAMES, columns)


def results(rows: Sequence[Row], known: Sequence[Setting]) -> str:
    """Losses and costs at the best rate."""
    found = {one: [row for row in rows if setting(row) == one and "test_loss" in row] for one in known}
    shown = [one for one in known if found[one]]
    columns = {
        "lr": lambda one: f"{found[one][0]['lr']:.3g}",
        "test loss": lambda one: mean_deviation([row["test_loss"] for row in found[one]]),
        "development loss": lambda one: mean_deviation([row["dev_loss"] for row in found[one]]),
        "seeds": lambda one: str(len(found[one])),
        "CPU s / step": lambda one: mean(row["cpu_seconds"] / row["steps"] for row in found[one]),
        "peak RSS, GB": lambda one: median([row["peak_bytes"] for row in found[one]], 2, 1e-9),
        "weights with a gradient, M": lambda one: f"{found[one][0]['trainable'] / 1e6:.1f}",
    }
    return table("Loss and cost", shown, NAMES, columns)
