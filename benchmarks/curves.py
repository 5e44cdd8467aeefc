# SPDX-License-Identifier: Apache-2.0
"""Plots of suite ``quality``: loss against what was spent, and which layers trained when."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.figure import Figure

from benchmarks.contest import METHODS, STEPS
from benchmarks.spending import SPENT, compares, points, untrained_loss
from benchmarks.tasks import TASKS
from benchmarks.worth import draw_worth

Row = dict[str, Any]
SIZE = {"dpi": 90}


def draw(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Write the plots of every task that has rows; yields their files."""
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task and row.get("curve") and row["steps"] == STEPS]
        if mine:
            yield _losses(task, mine, untrained_loss(rows, task), folder / f"loss-{task}.png")
            yield _layers(task, mine, folder / f"layers-{task}.png")
        if valued := [row for row in rows if row["task"] == task and "worth" in row]:
            yield _worth(valued, folder / f"worth-{task}.png")


def _losses(task: str, rows: Sequence[Row], untrained: float | None, file: Path) -> Path:
    """Against what was spent; a line per method, the mean of its seeds."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (what, label) in zip(figure.subplots(1, len(SPENT), sharey=True), SPENT.items(), strict=True):
        for method in METHODS:
            mine = [row for row in rows if row["method"] == method]
            runs = [points(row, untrained) for row in mine]
            if runs and compares(what, mine, rows):
                seeds = list(zip(*runs, strict=True))  # one tuple per point of the curve
                across, losses = (
                    [statistics.mean(point[name] for point in point_of_seeds) for point_of_seeds in seeds]
                    for name in (what, "dev_loss")
                )
                axes.plot(across, losses, label=method, color=f"C{METHODS.index(method)}")  # alike in all panels
        axes.set(xlabel=label)
    figure.axes[0].set(ylabel="loss on development rows", title=f"{task}: means over seeds")
    figure.axes[0].legend(fontsize=7)
    figure.savefig(file, **SIZE)
    return file


def _layers(task: str, rows: Sequence[Row], file: Path) -> Path:
    """One panel per method that draws: layers upwards, steps to the right; how many of the seeds trained a layer."""
    drawn = [method for method in METHODS if any(row["method"] == method and row["active"] for row in rows)]
    figure = Figure(figsize=(3.0 * len(drawn), 3.4), layout="constrained")
    for axes, method in zip(figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0], drawn, strict=True):
        mine = [row for row in rows if row["method"] == method]
        layers = 1 + max(layer for row in mine for step in row["active"] for layer in step or [])
        table = numpy.zeros((layers, len(mine[0]["active"])))
        for row in mine:
            for number, step in enumerate(row["active"]):
                table[step or [], number] += 1
        axes.imshow(table, origin="lower", aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set(title=method, xlabel="step")
    figure.axes[0].set(ylabel=f"layer ({task})")
    figure.savefig(file, **SIZE)
    return file


def _worth(rows: Sequence[Row], file: Path) -> Path:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    draw_worth(rows, figure.subplots(1, 2))
    figure.savefig(file, **SIZE)
    return file
