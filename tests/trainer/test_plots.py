# SPDX-License-Identifier: Apache-2.0
"""`grass_ds.trainer.plots`: what the pictures show is read back from the drawn objects."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from grass_ds.trainer.history import History, HistoryRow
from grass_ds.trainer.plots import INACTIVE, MAX_COLUMNS, PROBING, TRAINED, layer_heatmap, probability_plot, save_plots


def make_history(path: Path, num_layers: int, steps: int, probe: int = 0, period: int = 1, first: int = 1) -> History:
    names = [f"model.layers.{i}" for i in range(num_layers)]
    history = History(path / "h.jsonl", layers=names, sampler="grass", num_active_layers=1)
    for step in range(first, first + steps):
        probing = step - first < probe
        active = tuple(range(num_layers)) if probing else ((step - first - probe) // period % num_layers,)
        weights = [1.0] * num_layers if probing else [1.0 + i for i in range(num_layers)]
        probabilities = tuple(weight / sum(weights) for weight in weights)
        history.append(HistoryRow(step, "probe" if probing else "train", active, probabilities, None))
    return history


def heatmap(history: History) -> np.ndarray:
    return layer_heatmap(history).axes[0].images[0].get_array()


def test_heatmap_shows_probing_training_rest_and_gaps(tmp_path: Path) -> None:
    history = make_history(tmp_path, num_layers=3, steps=8, probe=2, period=2)
    history.append(HistoryRow(11, "train", (0, 1, 2), (1 / 3,) * 3, None))
    expected = np.empty((3, 11, 3))
    expected[:] = to_rgb(INACTIVE)
    expected[:, :2] = to_rgb(PROBING)
    for layer in range(3):
        expected[layer, 2 + 2 * layer : 4 + 2 * layer] = to_rgb(TRAINED)
    expected[:, 8:10] = 1.0  # steps that the history does not have
    expected[:, 10] = to_rgb(TRAINED)
    np.testing.assert_allclose(heatmap(history), expected, atol=1e-6)


def test_heatmap_axes_are_steps_and_layers(tmp_path: Path) -> None:
    figure = layer_heatmap(make_history(tmp_path, num_layers=4, steps=10, first=21))
    steps, totals = figure.axes
    assert steps.images[0].get_extent() == [20.5, 30.5, -0.5, 3.5]
    assert steps.get_xlabel() == "step"
    assert "layer" in steps.get_ylabel()
    assert figure.get_suptitle() == "Layers trained at each step: sampler grass, \N{GREEK SMALL LETTER GAMMA} = 1"
    assert [bar.get_width() for bar in totals.patches] == [3, 3, 2, 2]


@pytest.mark.parametrize("steps", [2 * MAX_COLUMNS, 2 * MAX_COLUMNS + 7])
def test_a_long_run_is_binned_and_loses_no_step(tmp_path: Path, steps: int) -> None:
    history = make_history(tmp_path, num_layers=2, steps=steps)  # the two layers take turns every step
    image = heatmap(history)
    assert image.shape[1] == MAX_COLUMNS
    trained, inactive = np.array(to_rgb(TRAINED)), np.array(to_rgb(INACTIVE))
    blue = (image[..., 0] - inactive[0]) / (trained[0] - inactive[0])
    np.testing.assert_allclose(blue.sum(axis=0), 1.0, atol=1e-5)
    if steps == 2 * MAX_COLUMNS:
        np.testing.assert_allclose(blue, 0.5, atol=1e-5)


def test_probabilities_are_drawn_while_training_only(tmp_path: Path) -> None:
    figure = probability_plot(make_history(tmp_path, num_layers=3, steps=6, probe=2))
    axes = figure.axes[0]
    lines = axes.lines[:3]
    for index, line in enumerate(lines):
        values = np.asarray(line.get_ydata())
        assert np.isnan(values[:2]).all()
        np.testing.assert_allclose(values[2:], (1 + index) / 6)
    assert len({tuple(line.get_color()) for line in lines}) == 3
    assert axes.get_xlabel() == "step"
    assert "probability" in axes.get_ylabel()
    assert "sampler grass" in figure.get_suptitle()


def test_every_probing_has_a_band_and_one_name(tmp_path: Path) -> None:
    history = make_history(tmp_path, num_layers=3, steps=6, probe=2)
    for step, phase in enumerate(("probe", "probe", "train"), start=7):
        history.append(HistoryRow(step, phase, (0, 1, 2), (1 / 3,) * 3, None))
    figure = probability_plot(history)
    bands = [(band.get_x(), band.get_x() + band.get_width()) for band in figure.axes[0].patches]
    assert bands == [(0.5, 2.5), (6.5, 8.5)]
    assert [text.get_text() for text in figure.legends[0].get_texts()].count("probing") == 1
    np.testing.assert_allclose(heatmap(history)[0, 6:8], [to_rgb(PROBING)] * 2)


@pytest.mark.parametrize(("num_layers", "steps", "probe"), [(1, 1, 1), (30, 100, 20)])
def test_plots_are_png_files(tmp_path: Path, num_layers: int, steps: int, probe: int) -> None:
    history = make_history(tmp_path, num_layers, steps, probe, period=25)
    paths = save_plots(history, tmp_path / "deep" / "plots")
    assert [path.name for path in paths] == ["layers.png", "probabilities.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5_000
    assert save_plots(make_history(tmp_path, num_layers, steps=0), tmp_path / "none") == []


def test_matplotlib_is_lazy_and_its_backend_untouched(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from grass_ds.trainer.history import History, HistoryRow
from grass_ds.trainer.plots import save_plots
assert "matplotlib" not in sys.modules
history = History(Path({str(tmp_path / "h.jsonl")!r}), layers=["a", "b"], sampler="full", num_active_layers=2)
history.append(HistoryRow(1, "train", (0, 1), (0.5, 0.5), None))
save_plots(history, Path({str(tmp_path)!r}))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
