# SPDX-License-Identifier: Apache-2.0
"""Whether layers with large gradients are the ones worth training: each layer is trained alone for a few steps, and the loss measured."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import nn

from benchmarks.places import header, line
from benchmarks.staleness import gradient_rms, rank_correlation
from grass_ds.policy.importance import per_cost, probabilities, sampling_logits, softmax

Row = dict[str, Any]
Batch = Mapping[str, torch.Tensor]
CLIP = 1.0
UNIFORM = "uniformly"


def layer_worth(
    model: nn.Module, batches: Sequence[Batch], lr: float, loss: Callable[[nn.Module], float]
) -> dict[str, Any]:
    """Losses of the model with one layer trained, for every layer: from the same weights, on the same batches.

    Plain PyTorch on a float32 copy, AdamW with a constant learning rate, so that nothing but the layer differs.

    Returns:
        ``scores``: gradient RMS of every layer before any step, mean over the batches; ``before``: the loss then; ``losses``: per
        layer, in nats, after one step on each batch.
    """
    model = copy.deepcopy(model).float()
    scores = gradient_rms(model, batches)
    model.requires_grad_(False)
    before, losses = loss(model), []
    for layer in model.get_decoder().layers:
        kept = copy.deepcopy(layer.state_dict())
        layer.requires_grad_(True)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), CLIP)
            optimizer.step()
        losses.append(loss(model))
        layer.load_state_dict(kept)
        layer.requires_grad_(False)
        optimizer.zero_grad()
    return {"scores": scores, "before": before, "losses": losses}


def worths(found: Mapping[str, Any]) -> list[float]:
    """How much less the loss is with each layer trained, in nats."""
    return [found["before"] - loss for loss in found["losses"]]


def worth_note(rows: Sequence[Row]) -> str:
    """How scores, worths and the seeds agree."""
    one = rows[0]
    agree = statistics.mean(rank_correlation(row["worth"]["scores"], worths(row["worth"])) for row in rows)
    text = (
        f"Each layer trained alone for {one['worth']['steps']} steps from the untrained weights (float32, plain AdamW, constant learning rate "
        f"{one['lr']:g}, the same batches for all layers, {len(rows)} seeds, commit {', '.join(sorted({row['commit'] for row in rows}))}); a layer's worth is how much "
        f"less the development loss is then. Rank correlation of the layers' gradient RMS with their worth: {agree:+.2f}"
    )
    if len(rows) > 1:
        between = [
            rank_correlation(*map(measure, (rows[0]["worth"], rows[1]["worth"])))
            for measure in (lambda found: found["scores"], worths)
        ]
        text += "; of two seeds' gradient RMS {:+.2f}, of two seeds' worths {:+.2f}".format(*between)
    return text + "."


def worth_table(rows: Sequence[Row]) -> list[str]:
    """What one layer brings on average, by how it is drawn; means over the seeds, each with its own scores."""
    lines = header(
        "one layer drawn",
        "loss less by, in nats",
        "of uniform",
        "arithmetic, of uniform",
        "loss less per arithmetic, of uniform",
    )
    table = [_draws(row["worth"]) for row in rows]
    for name in table[0]:
        brings, plain = (
            [_mean(draws[draw], worths(row["worth"])) for row, draws in zip(rows, table, strict=True)]
            for draw in (name, UNIFORM)
        )
        cost, plain_cost = (
            [_mean(draws[draw], costs(len(draws[draw]))) for draws in table] for draw in (name, UNIFORM)
        )
        more, dearer = (sum(ours) / sum(theirs) for ours, theirs in ((brings, plain), (cost, plain_cost)))
        lines.append(
            line([name, f"{statistics.mean(brings):.4f}", f"{more:.2f}", f"{dearer:.2f}", f"{more / dearer:.2f}"])
        )
    return lines


def _draws(found: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Chances of the layers."""
    scores, worth = found["scores"], worths(found)
    raw = sampling_logits(scores, 1.0, "mean")
    return {
        UNIFORM: [1 / len(scores)] * len(scores),
        "by gradient RMS, temperature 1 (default)": softmax(raw),
        "by gradient RMS, temperature 0.25": probabilities(scores, 0.25, "mean"),
        "by gradient RMS, temperature 1, `cost_weight` 8": softmax(per_cost(raw, 8.0)),
        "the layer of largest gradient RMS": [float(score == max(scores)) for score in scores],
        "the layer that is worth most": [float(value == max(worth)) for value in worth],
    }


def costs(layers: int) -> list[float]:
    """Arithmetic of a step that trains one layer, in forward passes of a layer: as ``grass.cost_weight`` counts it."""
    return [2.0 * layers - layer + 1 for layer in range(layers)]


def _mean(chances: Sequence[float], values: Sequence[float]) -> float:
    return sum(chance * value for chance, value in zip(chances, values, strict=True))


def draw_worth(rows: Sequence[Row], axes: Sequence[Axes]) -> None:
    """Per layer the worth, and beside it the gradient RMS in units of its mean; a line per seed."""
    for row in rows:
        scores = row["worth"]["scores"]
        axes[0].plot(worths(row["worth"]), label=f"seed {row['seed']}")
        axes[1].plot([score / statistics.mean(scores) for score in scores], label=f"seed {row['seed']}")
    axes[0].set(xlabel="layer", ylabel="loss less by, nats", title="trained alone")
    axes[1].set(xlabel="layer", ylabel="of the layers' mean", title="gradient RMS")
    axes[0].legend(fontsize=7)
