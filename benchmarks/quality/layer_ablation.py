# SPDX-License-Identifier: Apache-2.0
"""Each layer trained alone for a few steps, and the loss measured. Rows call it ``worth``."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.quality.scores import gradient_rms

Batch = Mapping[str, torch.Tensor]
CLIP = 1.0


def train_each_layer(
    model: nn.Module, batches: Sequence[Batch], lr: float, loss: Callable[[nn.Module], float]
) -> dict[str, Any]:
    """Loss with one layer trained, for every layer: from the same weights, on the same batches.

    Plain PyTorch on a float32 copy and AdamW with a constant learning rate, so that nothing but the layer differs.

    Returns:
        ``scores``: gradient RMS of every layer before any step, mean over the batches; ``before``: the loss then;
        ``losses``: per layer, in nats, after one step on each batch.
    """
    model = copy.deepcopy(model).float()
    scores = gradient_rms(model, batches)
    model.requires_grad_(False)
    before, losses = loss(model), []
    for layer in model.get_decoder().layers:
        initial = copy.deepcopy(layer.state_dict())
        layer.requires_grad_(True)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), CLIP)
            optimizer.step()
        losses.append(loss(model))
        layer.load_state_dict(initial)
        layer.requires_grad_(False)
        optimizer.zero_grad()
    return {"scores": scores, "before": before, "losses": losses}
