# SPDX-License-Identifier: Apache-2.0
"""The loss curves of runs in one figure. matplotlib is imported when it is drawn."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grass_ds.compare.saved_run import SavedRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito colours without the pale yellow; runs beyond them get other dashes.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")


def loss_figure(runs: Sequence[SavedRun]) -> "Figure":
    """Training loss over steps, one line per run that has losses; each point is a log line.

    Raises:
        ValueError: no run has losses.
    """
    drawn = [run for run in runs if run.losses]
    if not drawn:
        names = ", ".join(run.name for run in runs)
        raise ValueError(f"no loss curve to draw: {names}: no losses in trainer_state.json")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(drawn):
        steps, losses = zip(*run.losses, strict=True)
        dashes = DASHES[index // len(COLOURS) % len(DASHES)]
        # A label that begins with an underscore would be left out.
        label = f" {run.name}" if run.name.startswith("_") else run.name
        marker = "." if len(steps) < 100 else ""
        axes.plot(
            steps, losses, dashes, color=COLOURS[index % len(COLOURS)], marker=marker, linewidth=1.4, label=label
        )
    axes.set(xlabel="step", ylabel="training loss (nats per token)")
    axes.grid(color="#DDDDDD", linewidth=0.6)
    legend = figure.legend(loc="outside lower center", ncols=min(len(drawn), 4), frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name is no formula
    return figure
