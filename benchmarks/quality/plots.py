# SPDX-License-Identifier: Apache-2.0
"""Plots of suite ``quality``: loss against what was spent, which layers trained when, and what each layer brings."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.figure import Figure

from benchmarks.quality.equal_budget import BUDGETS, comparable, points, untrained_loss
from benchmarks.quality.layer_tables import decreases
from benchmarks.quality.suite import COMPARED, STEPS
from benchmarks.tasks import TASKS

Row = dict[str, Any]
SAVED = {"dpi": 90, "metadata": {"Software": None}}


def draw(rows: list[Row], folder: Path) -> None:
    """Write the plots of every task that has rows."""
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        short = [row for row in mine if row.get("curve") and row["steps"] == STEPS]
        if short:
            loss_figure(task, short, untrained_loss(rows, task)).savefig(folder / f"loss-{task}.png", **SAVED)
            layer_figure(task, short).savefig(folder / f"layers-{task}.png", **SAVED)
        if ablated := [row for row in mine if "worth" in row]:
            ablation_figure(ablated).savefig(folder / f"layer-ablation-{task}.png", **SAVED)


def loss_figure(task: str, rows: Sequence[Row], untrained: float | None) -> Figure:
    """A panel per kind of budget, a line per method: the mean over seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (budget, label) in zip(figure.subplots(1, len(BUDGETS), sharey=True), BUDGETS.items(), strict=True):
        for number, method in enumerate(COMPARED):
            mine = [row for row in rows if row["method"] == method]
            if mine and comparable(budget, mine, rows):
                steps = list(zip(*(points(row, untrained) for row in mine), strict=True))
                xs, ys = (
                    [statistics.fmean(point[name] for point in seeds) for seeds in steps]
                    for name in (budget, "dev_loss")
                )
                axes.plot(xs, ys, label=method, color=f"C{number}")
        axes.set(xlabel=label)
    figure.axes[0].set(ylabel="loss on development rows", title=f"{task}: means over seeds")
    figure.axes[0].legend(fontsize=7)
    return figure


def layer_figure(task: str, rows: Sequence[Row]) -> Figure:
    """A panel per method that draws: layers upwards, steps to the right; how many seeds trained a layer."""
    drawn = [method for method in COMPARED if any(row["method"] == method and row["active"] for row in rows)]
    figure = Figure(figsize=(3.0 * max(1, len(drawn)), 3.4), layout="constrained")
    panels = figure.subplots(1, max(1, len(drawn)), sharey=True, squeeze=False)[0]
    for axes, method in zip(panels, drawn, strict=False):
        mine = [row for row in rows if row["method"] == method]
        layers = 1 + max(layer for row in mine for step in row["active"] for layer in step or [])
        visits = numpy.zeros((layers, len(mine[0]["active"])))
        for row in mine:
            for number, step in enumerate(row["active"]):
                visits[step or [], number] += 1
        axes.imshow(visits, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set(title=method, xlabel="step")
    panels[0].set(ylabel=f"layer ({task})")
    return figure


def ablation_figure(rows: Sequence[Row]) -> Figure:
    """Per layer the decrease of the loss, and the gradient RMS over its mean; a line per seed."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        scores = row["worth"]["scores"]
        left.plot(decreases(row["worth"]), label=f"seed {row['seed']}")
        right.plot([score / statistics.fmean(scores) for score in scores], label=f"seed {row['seed']}")
    left.set(xlabel="layer", ylabel="loss less by, nats", title="trained alone")
    right.set(xlabel="layer", ylabel="of the layers' mean", title="gradient RMS")
    left.legend(fontsize=7)
    return figure
