# SPDX-License-Identifier: Apache-2.0
"""Plots of suite ``quality``: loss against steps and time, and which layers trained when."""

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
from matplotlib.figure import Figure

from benchmarks.contest import METHODS
from benchmarks.tasks import TASKS

Row = dict[str, Any]
SIZE = {"dpi": 90}


def draw(rows: Sequence[Row], folder: Path) -> Iterator[Path]:
    """Write the plots of every task that has rows; yields their files."""
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task and row.get("curve")]
        if mine:
            yield _losses(task, mine, folder / f"loss-{task}.png")
            yield _layers(task, mine, folder / f"layers-{task}.png")


def _losses(task: str, rows: Sequence[Row], file: Path) -> Path:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, axis, label in zip(
        figure.subplots(1, 2, sharey=True), ("step", "cpu_seconds"), ("steps", "CPU seconds of steps"), strict=True
    ):
        for method in METHODS:
            runs = [row["curve"] for row in rows if row["method"] == method]
            if runs:
                points = list(zip(*runs, strict=True))  # one tuple of seeds per point of the curve
                across = [statistics.mean(point[axis] for point in seeds) for seeds in points]
                axes.plot(
                    across, [statistics.mean(point["dev_loss"] for point in seeds) for seeds in points], label=method
                )
        axes.set(xlabel=label)
    figure.axes[0].set(ylabel="loss on development rows", title=f"{task}: means over seeds")
    figure.axes[1].legend(fontsize=7)
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
