# SPDX-License-Identifier: Apache-2.0
"""Plots of the benchmarks. matplotlib's object interface only: no display, no global state."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Series = Mapping[str, Sequence[tuple[float, float]]]


def log_log(path: Path, xlabel: str, panels: Mapping[str, Series]) -> None:
    """Write a PNG: beside one another, panels with their points and straight lines between them, both axes logarithmic.

    Args:
        panels: label of the y axis -> label of a line -> its points (x, y), both positive.
    """
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (ylabel, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, points in series.items():
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=1.2, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(
            ticks, [f"{tick / 1024:g}k" if tick >= 10_000 and tick % 1024 == 0 else f"{tick:g}" for tick in ticks]
        )
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(which="both", color="#DDDDDD", linewidth=0.6)
        # above the lines: there is no corner that they leave free in all panels
        axes.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0.0, 1.0))
    figure.savefig(path, dpi=100, metadata={"Software": None})
