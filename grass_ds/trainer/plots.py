# SPDX-License-Identifier: Apache-2.0
"""Two pictures of a run, drawn from its `History`: layers x steps, and the draw probabilities over time.

matplotlib is imported when a plot is drawn. Without pyplot the backend and the open figures of the process stay as
they are.
"""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from grass_ds.trainer.history import History

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito colours: distinguishable under every common colour vision deficiency, and by lightness in print.
TRAINED = "#0072B2"
PROBING = "#F0C566"
INACTIVE = "#EDEDED"
MAX_COLUMNS = 1200  # about one per pixel; more would alias
LAYER = "layer (0 is next to the embeddings)"


def save_plots(history: History, folder: Path) -> list[Path]:
    """Draw `layers.png` and `probabilities.png` in `folder`, which is created if missing. Returns their paths.

    Without a step in the history there are none. ImportError: matplotlib is not installed.
    """
    if not history.rows:
        return []
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"layers.png": layer_heatmap(history), "probabilities.png": probability_plot(history)}
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=150)
    return [folder / name for name in figures]


def layer_heatmap(history: History) -> "Figure":
    """Which layers each step trained or probed, and the number of training steps per layer."""
    from matplotlib.patches import Patch

    num_layers = len(history.layers)
    first, last = history.rows[0].step, history.rows[-1].step
    figure = _figure(history, "Layers trained at each step", height=2.1 + 0.16 * min(max(num_layers, 8), 48))
    steps, totals = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    extent = (first - 0.5, last + 0.5, -0.5, num_layers - 0.5)
    steps.imshow(_heatmap_image(history), extent=extent, origin="lower", aspect="auto", interpolation="nearest")
    steps.hlines(np.arange(num_layers - 1) + 0.5, first - 0.5, last + 0.5, color="white", linewidth=0.6)
    steps.set(xlabel="step", ylabel=LAYER)
    steps.locator_params(axis="y", nbins=20, integer=True)
    totals.barh(range(num_layers), history.visits(), color=TRAINED, height=0.7)
    totals.set(xlabel="steps trained")
    totals.locator_params(axis="x", nbins=3, integer=True)
    legend = {"trained": TRAINED, "inactive": INACTIVE, "probed, no update": PROBING}
    patches = [Patch(facecolor=colour, edgecolor="#999999", label=name) for name, colour in legend.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    return figure


def probability_plot(history: History) -> "Figure":
    """p_l of the next draw over time: one line per layer, coloured by depth, with gaps while probing."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    num_layers = len(history.layers)
    # viridis keeps its order under colour vision deficiency; its yellow end is too pale for lines on white.
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.88, num_layers)))
    numbers = [row.step for row in history.rows]
    figure = _figure(history, "Draw probability of each layer", height=4.6)
    axes = figure.subplots()
    for index in range(num_layers):
        values = [row.probabilities[index] if row.phase == "train" else np.nan for row in history.rows]
        axes.step(numbers, values, where="post", color=colours(index), linewidth=1.3, alpha=0.9)
    axes.axhline(1 / num_layers, color="#555555", linestyle="--", linewidth=1, label=f"uniform, 1/{num_layers}")
    label: str | None = "probing"
    for phase, rows in groupby(history.rows, key=lambda row: row.phase):
        if phase == "probe":
            steps = [row.step for row in rows]
            axes.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color=PROBING, alpha=0.5, linewidth=0, label=label)
            label = None  # named once
    axes.set(xlabel="step", ylabel="probability of the next draw", ylim=(0, None))
    depth = ScalarMappable(Normalize(-0.5, num_layers - 0.5), colours)
    figure.colorbar(depth, ax=axes, label=LAYER, ticks=MaxNLocator(12, integer=True))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _figure(history: History, title: str, height: float) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    gamma = f"\N{GREEK SMALL LETTER GAMMA} = {history.num_active_layers}"
    # A name from a file is no formula.
    figure.suptitle(f"{title}: sampler {history.sampler}, {gamma}", parse_math=False)
    return figure


def _heatmap_image(history: History) -> np.ndarray:
    """RGB, float32 [layers, columns, 3]; steps that are not in the history stay white.

    A run of more than `MAX_COLUMNS` steps is binned: a column has the mean colour of its steps.
    """
    from matplotlib.colors import to_rgb

    first, last = history.rows[0].step, history.rows[-1].step
    image = np.ones((len(history.layers), last - first + 1, 3), dtype=np.float32)
    for row in history.rows:
        image[:, row.step - first] = to_rgb(INACTIVE)
        image[list(row.active_layers), row.step - first] = to_rgb(PROBING if row.phase == "probe" else TRAINED)
    bins = np.array_split(image, min(image.shape[1], MAX_COLUMNS), axis=1)
    return np.stack([steps.mean(axis=1) for steps in bins], axis=1)
