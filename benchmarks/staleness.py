# SPDX-License-Identifier: Apache-2.0
"""Whether the scores that layers are drawn by still hold: they are measured anew, on all layers, while training goes on."""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby, takewhile
from typing import Any

import numpy
import torch
from torch import nn

from benchmarks.places import header, line

REPROBE_BATCHES = 16  # of them two halves
Row = dict[str, Any]
Batch = Mapping[str, torch.Tensor]


class Reprobe:
    """Measures the gradient RMS of every layer at the weights of a model in training, on a copy of it.

    Args:
        model: before its engine is built.
        batches: measured on, the same ones each time; of two halves each gives scores of its own, so that their agreement tells how
            well that many batches can measure.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._copy = copy.deepcopy(model)
        if next(model.parameters()).dtype == torch.float16:
            self._copy.float()  # without a loss scale gradients underflow
        half = len(batches) // 2
        self._halves = (batches[:half], batches[half : 2 * half])

    def measure(self, model: nn.Module) -> list[list[float]]:
        """m_l of every layer from each half (paper: mean over steps of sqrt(||g_l||^2 / N_l); here over batches, without an update)."""
        self._copy.load_state_dict(model.state_dict())
        return [gradient_rms(self._copy, batches) for batches in self._halves]


def gradient_rms(model: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """m_l of every layer: sqrt(||g_l||^2 / N_l), mean over batches. Leaves no gradients."""
    layers = list(model.get_decoder().layers)
    device = next(model.parameters()).device
    sums = [0.0] * len(layers)
    for batch in batches:
        model.zero_grad(set_to_none=True)
        model(**{name: value.to(device) for name, value in batch.items()}).loss.backward()
        for index, layer in enumerate(layers):
            square = sum(p.grad.float().square().sum().item() for p in layer.parameters())
            sums[index] += math.sqrt(square / sum(p.numel() for p in layer.parameters()))
    model.zero_grad(set_to_none=True)
    return [value / len(batches) for value in sums]


def staleness_note(rows: Sequence[Row]) -> str:
    one = rows[0]
    return (
        f"True scores: gradient RMS at the weights of that step, mean over {REPROBE_BATCHES} batches that no run is trained on in this order; two halves "
        f"of them tell how well {REPROBE_BATCHES // 2} measure. Scores drawn by are means over the {one['grass']['probe_steps']} steps of the last probing, and of "
        "layers that trained between it and a refresh, with what their steps measured; first scores are those of the first probing. Ratios: a score over the true "
        "one, both divided by the mean of all layers first, which is what the draw sees. `reprobe_period` 0: probed once; what probing again does to the "
        f"loss is in the table of settings changed. {len({row['seed'] for row in rows})} seeds, learning rate {one['lr']:g}."
    )


def staleness_table(rows: Sequence[Row]) -> list[str]:
    """Rank correlation of scores with those measured anew, as training goes on, and how far they are off; means over the rows."""
    lines = header(
        "`reprobe_period`",
        "after step",
        "rank correlation with true scores: of scores drawn by",
        "of first scores",
        "of the true ones' halves with each other",
        "layers trained since the scores of all were measured",
        "ratio to the true score of those: least, most",
        "of the others: least, most",
    )
    for period, alike in groupby(sorted(rows, key=reprobe_period), key=reprobe_period):
        mine = list(alike)
        for number in sorted({found["step"] for row in mine for found in row["reprobes"]}):
            points = [(row, found) for row in mine for found in row["reprobes"] if found["step"] == number]
            lines.append(line([str(period), str(number), *_staleness(points)]))
    return lines


def reprobe_period(row: Row) -> int:
    return row["grass"].get("reprobe_period", 0)


def _staleness(points: Sequence[tuple[Row, Row]]) -> list[str]:
    """What the table shows of a row's point, over several rows."""
    now, first, ceiling, met, trained, idle = [], [], [], [], [], []
    for row, found in points:
        true = [statistics.mean(pair) for pair in zip(*found["true"], strict=True)]
        now.append(rank_correlation(found["scores"], true))
        first.append(rank_correlation(row["reprobes"][0]["scores"], true))
        ceiling.append(rank_correlation(*found["true"]))
        seen = _trained_since_probing(row["active"], found["step"])
        met.append(len(seen))
        for layer, ratio in enumerate(_relative(found["scores"], true)):
            (trained if layer in seen else idle).append(ratio)
    return [
        *(f"{statistics.mean(values):.2f}" for values in (now, first, ceiling)),
        f"{statistics.mean(met):.0f}",
        *(f"{min(values):.2f}, {max(values):.2f}" if values else "" for values in (trained, idle)),
    ]


def _trained_since_probing(active: Sequence[Sequence[int] | None], steps: int) -> set[int]:
    """Layers trained until then since the probing that the scores are from; ``active``: of every step, None if it probed."""
    if steps < len(active) and active[steps] is None:  # a probing under way, of which there are no scores yet
        while steps and active[steps - 1] is None:
            steps -= 1
    since = takewhile(lambda layers: layers is not None, reversed(active[:steps]))
    return {layer for layers in since for layer in layers or ()}


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, without ties."""
    ranks = [numpy.argsort(numpy.argsort(values)) for values in (left, right)]
    return float(numpy.corrcoef(*ranks)[0, 1])


def _relative(scores: Sequence[float], true: Sequence[float]) -> list[float]:
    """Each score over the true one, both divided by their mean first: what the draw sees."""
    return [
        (score / statistics.mean(scores)) / (value / statistics.mean(true))
        for score, value in zip(scores, true, strict=True)
    ]
