# SPDX-License-Identifier: Apache-2.0
"""Scores of all layers, measured again while training goes on."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

REPROBE_BATCHES = 16  # two halves
Batch = Mapping[str, torch.Tensor]


class ScoreProbe:
    """Measures the gradient RMS of every layer at the weights of a model in training, on a copy of it.

    Args:
        model: before its engine is built.
        batches: the same at every measurement. Each half gives scores of its own; their agreement tells how well so
            many batches can measure.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._copy = copy.deepcopy(model)
        if next(model.parameters()).dtype == torch.float16:
            self._copy.float()  # without a loss scale gradients underflow
        half = len(batches) // 2
        self._halves = (batches[:half], batches[half : 2 * half])

    def measure(self, model: nn.Module) -> list[list[float]]:
        """The scores of every layer from each half."""
        self._copy.load_state_dict(model.state_dict())
        return [gradient_rms(self._copy, batches) for batches in self._halves]


def gradient_rms(model: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """The score of every layer: sqrt(||g||^2 / N), mean over batches, without an update. Leaves no gradients."""
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
