# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``quality``, a section per task. ``README.md`` says how to read them."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.comparisons import (
    change_tables,
    distance_from_uniform,
    longer_tables,
    pair_tables,
    redrawn_tables,
    trained,
)
from benchmarks.quality.equal_budget import budget_table, comparable, untrained_loss
from benchmarks.quality.layer_tables import layer_tables
from benchmarks.quality.staleness import staleness_tables
from benchmarks.quality.suite import COMPARED, RATES, SETTINGS, STEPS, TUNING_SEED, best_rates, tried_rates
from benchmarks.report.table import conditions, each, mean, mean_deviation, median, table
from benchmarks.tasks import ROWS, TASKS

Row = dict[str, Any]


def tables(rows: list[Row]) -> list[str]:
    blocks = []
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        if mine:
            blocks += [f"## Quality: task `{task}`", conditions(mine, *_conditions(task, mine)), *_tables(task, mine)]
    return blocks


def _conditions(task: str, rows: Sequence[Row]) -> list[str]:
    one, exam = rows[0], TASKS[task]
    answers = "exact match of generated numbers" if exam.exact else "the most likely option"
    counts = next((row["train_rows"] for row in rows if "train_rows" in row), {})
    shares = [f"{source} ({count / sum(counts.values()):.0%} of the rows)" for source, count in counts.items()]
    return [
        f"trained on {', '.join(shares if len(shares) > 1 else exam.train)}; fingerprint {each(rows, 'data')}",
        f"{STEPS} steps, of which the first ones probe; {', '.join(f'`{name}` {n}' for name, n in SETTINGS.items())}",
        f"loss: {one['dev_rows']} development rows, {one['test_rows']} test rows",
        f"accuracy: {answers}, {exam.answered(ROWS)} test rows per source",
    ]


def _tables(task: str, rows: Sequence[Row]) -> list[str]:
    compared = [row for row in rows if "test_loss" in row]
    short = [row for row in rows if row.get("curve") and row["steps"] == STEPS]
    blocks = [rate_table(task, rows), *result_tables(compared), *pair_tables(compared), *redrawn_tables(rows)]
    if short:
        blocks += [budget_table(short, untrained_loss(rows, task))]
        blocks += [f"![loss](plots/loss-{task}.png)", f"![layers trained](plots/layers-{task}.png)"]
    blocks += [*longer_tables([row for row in rows if row["steps"] > STEPS], compared)]
    blocks += change_tables(rows, trained(compared, "grass"))
    if measured := [row for row in rows if row.get("reprobes")]:
        blocks += staleness_tables(measured)
    if ablated := [row for row in rows if "worth" in row]:
        blocks += [*layer_tables(ablated), f"![loss decrease per layer](plots/layer-ablation-{task}.png)"]
    return blocks


def rate_table(task: str, rows: Sequence[Row]) -> str:
    """Development loss per method and learning rate; the least is bold once no other rate is to be tried."""
    best, tried = best_rates(task, rows), tried_rates(task, rows)

    def loss(method: str, lr: float) -> str:
        text = f"{tried[method][lr]:.3f}" if lr in tried[method] else ""
        return f"**{text}**" if best.get(method) == lr else text

    columns = {"method": lambda method: method, **{f"{lr:g}": lambda m, lr=lr: loss(m, lr) for lr in RATES}}
    return table(
        f"Development loss by learning rate, seed {TUNING_SEED}", [m for m in COMPARED if m in tried], columns
    )


def result_tables(rows: Sequence[Row]) -> list[str]:
    """Losses, accuracies and costs of every method."""
    found = {"(untrained)": [row for row in rows if not row["steps"]]}
    found |= {method: trained(rows, method) for method in COMPARED}
    lines = [(name, mine) for name, mine in found.items() if mine]
    runs = [line for line in lines if line[1][0]["steps"]]
    names = {"method": lambda line: line[0]}
    accuracies = [(name, [row["accuracy"] for row in mine]) for name, mine in lines]
    if constant := next((row["constant"] for row in rows if row.get("constant")), None):
        accuracies.insert(1, ("(most frequent answer)", [constant]))
    losses = {
        **names,
        "lr": lambda line: f"{line[1][0]['lr']:g}" if line[1][0]["steps"] else "",
        "test loss": lambda line: mean_deviation([row["test_loss"] for row in line[1]]),
        "development loss": lambda line: mean_deviation([row["dev_loss"] for row in line[1]]),
        "seeds": lambda line: str(len(line[1])),
    }
    accuracy = {
        **names,
        "mean": lambda line: mean_deviation([statistics.fmean(one.values()) for one in line[1]]),
        **{
            source: lambda line, source=source: mean_deviation([one[source] for one in line[1]])
            for source in (rows[0]["accuracy"] if rows else ())
        },
    }
    cost = {
        **names,
        "CPU s / step": lambda line: (
            mean(row["cpu_seconds"] / row["steps"] for row in line[1])
            if comparable("cpu_seconds", line[1], rows)
            else ""
        ),
        "peak RSS, GB": lambda line: median([row["peak_bytes"] for row in line[1]], 2, 1e-9),
        "weights trained, M": lambda line: f"{line[1][0]['trainable'] / 1e6:.1f}",
        "draw, from uniform": lambda line: mean(map(distance_from_uniform, line[1])),
    }
    return [
        table("Loss, nats per answer token", lines, losses),
        table("Accuracy", accuracies, accuracy),
        table("Cost of the runs", runs, cost),
    ]
