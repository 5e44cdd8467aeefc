# SPDX-License-Identifier: Apache-2.0
"""The picture of suite ``frontier``: test loss over device memory, and over the arithmetic of a step."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.case import Row
from benchmarks.frontier.suite import Setting
from benchmarks.frontier.tables import device_bytes, reported, tflop

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito colours, one per method.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
AXES: dict[str, Callable[[Row], float]] = {
    "device memory in bf16, GB (cost model)": lambda row: device_bytes(row) / 1e9,
    "TFLOP per step (cost model)": tflop,
}


class Family(NamedTuple):
    """Settings that differ in the number of layers and the coefficient alone."""

    method: str
    expanded: bool
    deep: bool

    @property
    def name(self) -> str:
        return f"{self.method}{' with expansion' * self.expanded}{' from layer 0' * self.deep}"

    @property
    def marker(self) -> str:
        return "^" if self.deep else "s" if self.expanded else "o"


def family(one: Setting) -> Family:
    return Family(one.method, bool(one.expansion), one.depth == 0)


def draw(rows: Sequence[Row]) -> "Figure | None":
    """Mean over seeds, with the standard deviation. Labels are layers at a time. None without results."""
    from matplotlib.figure import Figure

    if not (found := reported(rows)):
        return None
    families: dict[Family, list[Setting]] = {}
    for one in sorted(found, key=lambda one: one.gamma or 0):
        families.setdefault(family(one), []).append(one)
    colours = dict(zip(dict.fromkeys(one.method for one in families), COLOURS, strict=False))
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    plots = figure.subplots(1, len(AXES), sharey=True)
    for plot, (label, measure) in zip(plots, AXES.items(), strict=True):
        for group, members in families.items():
            colour = colours[group.method]
            losses = [[row["test_loss"] for row in found[one]] for one in members]
            at = [statistics.fmean(map(measure, found[one])) for one in members]
            spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in losses]
            means = [statistics.fmean(values) for values in losses]
            plot.errorbar(
                at, means, spread, label=group.name, color=colour, marker=group.marker, linewidth=1, capsize=2
            )
            for one, x, y in zip(members, at, means, strict=True):
                if one.gamma is not None:
                    plot.annotate(str(one.gamma), (x, y), textcoords="offset points", xytext=(4, 4), color=colour)
        plot.set(xlabel=label)
        plot.grid(alpha=0.3)
    plots[0].set(ylabel="test loss, nats per answer token")
    plots[0].legend(frameon=False)
    return figure


def save(rows: Sequence[Row], file: Path) -> None:
    """Write the picture; nothing without results."""
    if (figure := draw(rows)) is not None:
        file.parent.mkdir(exist_ok=True)
        figure.savefig(file, dpi=110, metadata={"Software": None})
