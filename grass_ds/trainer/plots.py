# SPDX-License-Identifier: Apache-2.0
"""Two pictures of a run, drawn from its `History`: layers x steps, and the draw probabilities over time.

matplotlib is imported when a plot is drawn, and only its object interface is used: no pyplot, so neither the process's
backend nor its open figures change, and no display is needed.
"""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grass_ds.trainer.history import History

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito colours: distinguishable under every common colour vision deficiency, and by lightness in print.
TRAINED = "#0072B2"
PROBING = "#F0C566"
INACTIVE = "#EDEDED"
MAX_COLUMNS = 1200  # about one per pixel; more would alias


def save_plots(history: History, folder: str | Path) -> list[Path]:
    """Draw the run as PNG files.

    Args:
        history: the steps to draw.
        folder: created if missing.

    Returns:
        `layers.png` (heatmap of layers x steps) and `probabilities.png` (p_l over time); an empty list
        if it has no step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if not history.rows:
        return []
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in (("layers", layer_heatmap(history)), ("probabilities", probability_plot(history))):
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        paths.append(path)
    return paths


def layer_heatmap(history: History) -> "Figure":
    """Which layers each step trained; probing in a colour of its own; training steps per layer at the right."""
    from matplotlib.patches import Patch

    num_layers = len(history.layers)
    figure = _figure(height=2.1 + 0.16 * min(max(num_layers, 8), 48))
    steps, totals = figure.subplots(1, 2, sharey=True, width_ratios=(6, 1))
    image, first, last = _heatmap_image(history)
    steps.imshow(
        image, extent=(first - 0.5, last + 0.5, -0.5, num_layers - 0.5), origin="lower", aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    steps.hlines([i + 0.5 for i in range(num_layers - 1)], first - 0.5, last + 0.5, color="white", linewidth=0.6)
    steps.set(xlabel="step", ylabel="layer (0 is next to the embeddings)", yticks=_layer_ticks(num_layers))
    steps.set_title(f"Layers trained at each step: {_describe(history)}", loc="left")
    visits = history.visits()
    totals.barh(range(num_layers), visits, color=TRAINED, height=0.7)
    totals.set(xlabel="steps trained", xlim=(0, 1.1 * max(max(visits), 1)))
    totals.locator_params(axis="x", nbins=3, integer=True)
    totals.spines[["top", "right"]].set_visible(False)
    totals.tick_params(axis="y", length=0)
    legend = {"trained": TRAINED, "inactive": INACTIVE}
    if any(row.phase == "probe" for row in history.rows):
        legend["probed, no update"] = PROBING
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", linewidth=0.5, label=name) for name, colour in legend.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def probability_plot(history: History) -> "Figure":
    """p_l of the next draw over time, one line per layer coloured by depth; the likeliest layers are named."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    num_layers = len(history.layers)
    # viridis keeps its order under colour vision deficiency; its yellow end is too pale for lines on white.
    colours = colormaps["viridis"]([0.88 * i / max(num_layers - 1, 1) for i in range(num_layers)])
    numbers = [row.step for row in history.rows]
    figure = _figure(height=4.6)
    axes = figure.subplots()
    for index in range(num_layers):
        # Nothing is drawn from the probabilities while probing.
        values = [row.probabilities[index] if row.phase == "train" else float("nan") for row in history.rows]
        axes.step(numbers, values, where="post", color=colours[index], linewidth=1.3, alpha=0.9)
    axes.axhline(1 / num_layers, color="#555555", linestyle="--", linewidth=1, label=f"uniform, 1/{num_layers}")
    _shade_probing(axes, history)
    _name_top_layers(axes, history, colours)
    highest = max(max(row.probabilities) for row in history.rows)
    axes.set(xlabel="step", ylabel="probability of the next draw", ylim=(0, 1.12 * max(highest, 1 / num_layers)))
    axes.set_xlim(numbers[0] - 0.5, max(numbers[-1], numbers[0] + 1))
    axes.set_title(f"Draw probability of each layer: {_describe(history)}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    norm = BoundaryNorm([i - 0.5 for i in range(num_layers + 1)], num_layers)
    bar = figure.colorbar(ScalarMappable(norm, ListedColormap(colours)), ax=axes, pad=0.07)
    bar.set_ticks(_layer_ticks(num_layers, most=12), minor=False)
    bar.ax.minorticks_off()
    bar.set_label("layer (0 is next to the embeddings)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _figure(height: float) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _describe(history: History) -> str:
    return f"sampler {history.sampler}, \N{GREEK SMALL LETTER GAMMA} = {history.num_active_layers}"


def _layer_ticks(num_layers: int, most: int = 40) -> list[int]:
    return list(range(0, num_layers, -(-num_layers // most)))


def _heatmap_image(history: History) -> "tuple[np.ndarray, int, int]":
    """RGB float array (layers, columns, 3) and the first and last step; steps that are not in the history stay white.

    Runs of more than `MAX_COLUMNS` steps are binned, and a column shows the mean colour of its steps: a layer trained
    in half of them is half blue, so that no step is lost between pixels.
    """
    import numpy as np
    from matplotlib.colors import to_rgb

    first, last = history.rows[0].step, history.rows[-1].step
    length = last - first + 1
    image = np.ones((len(history.layers), length, 3), dtype=np.float32)
    for row in history.rows:
        column = row.step - first
        image[:, column] = to_rgb(INACTIVE)
        image[list(row.active_layers), column] = to_rgb(PROBING if row.phase == "probe" else TRAINED)
    columns = min(length, MAX_COLUMNS)
    starts = np.arange(columns) * length // columns
    sizes = np.diff(np.append(starts, length))
    return np.add.reduceat(image, starts, axis=1) / sizes[None, :, None], first, last


def _shade_probing(axes: "Axes", history: History) -> None:
    """A band per probing: before training, and whenever it is repeated."""
    label: str | None = "probing"
    for phase, rows in groupby(history.rows, key=lambda row: row.phase):
        if phase == "probe":
            steps = [row.step for row in rows]
            axes.axvspan(steps[0] - 0.5, steps[-1] + 0.5, color=PROBING, alpha=0.5, linewidth=0, label=label)
            label = None  # named once


def _name_top_layers(axes: "Axes", history: History, colours: Any, most: int = 3) -> None:
    """Write the indices of the likeliest layers beside the right end of their lines, kept apart by a line's height."""
    final = history.rows[-1].probabilities
    top = sorted(range(len(final)), key=lambda index: final[index], reverse=True)[:most]
    if max(final) - min(final) < 1e-6:  # uniform: no layer stands out
        return
    gap = 0.045 * max(max(row.probabilities) for row in history.rows)
    ceiling = float("inf")
    for index in top:
        ceiling = min(final[index], ceiling - gap)
        axes.annotate(
            f"layer {index}", (1, ceiling), (4, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            va="center", color=colours[index], fontsize=9, annotation_clip=False,
        )  # fmt: skip
