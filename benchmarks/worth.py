# SPDX-License-Identifier: Apache-2.0
"""Whether layers with large gradients are the ones worth training: each layer is trained alone for a few steps, and the loss measured."""

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import nn

from benchmarks import floors
from benchmarks.places import each, header, line
from benchmarks.staleness import gradient_rms, rank_correlation
from grass_ds.sampling.importance import probabilities

Row = dict[str, Any]
Batch = Mapping[str, torch.Tensor]
CLIP = 1.0
UNIFORM, DEFAULT, BEST = "uniformly", "by gradient RMS, temperature 1 (default)", "the layer of largest worth"


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
    text = (
        f"Each layer trained alone for {one['worth']['steps']} steps from the untrained weights (float32, plain AdamW, constant learning rate "
        f"{one['lr']:g}, the same batches for all layers, {len(rows)} seeds of batches, commit {each(rows, 'commit', ', ')}); "
        "a layer's worth is how much less the loss on the development rows is then. Gradient RMS is measured on the same batches before. Rank "
        f"correlation of the layers' gradient RMS with their worth: {agreement(rows):+.2f}"
    )
    if len(rows) > 1:
        first, second = (row["worth"] for row in rows[:2])
        text += (
            f"; of two seeds' gradient RMS {rank_correlation(first['scores'], second['scores']):+.2f}, of two seeds' worths "
            f"{rank_correlation(worths(first), worths(second)):+.2f} (on the same development rows). In the table one seed's figures draw "
            "and another's are what it brings, or the best would be the luckiest"
        )
    return text + "."


def brings(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By how one layer is drawn: how much less the loss is then, in nats, and FLOPs of its step; means over the seeds.

    Drawn by one seed's figures, valued by the next one's: two seeds at least, or the best is the luckiest.
    """
    draws = [_draws(row["worth"]) for row in rows]
    values = [worths(row["worth"]) for row in (*rows[1:], rows[0])]
    flops = [[floors.flops(row, [layer]) for layer in range(len(row["worth"]["scores"]))] for row in rows]
    found = {}
    for name in draws[0]:
        chances = [drawn[name] for drawn in draws]
        found[name] = statistics.mean(map(_mean, chances, values)), statistics.mean(map(_mean, chances, flops))
    return found


def agreement(rows: Sequence[Row]) -> float:
    """Rank correlation of the layers' gradient RMS with their worth, mean over the seeds."""
    return statistics.mean(rank_correlation(row["worth"]["scores"], worths(row["worth"])) for row in rows)


def worth_table(rows: Sequence[Row]) -> list[str]:
    """A line per way to draw one layer."""
    lines = header(
        "one layer drawn",
        "loss less by, in nats",
        "of uniform",
        "FLOPs of a step, of uniform",
        "loss less per FLOP, of uniform",
    )
    found = brings(rows)
    for name, (less, flops) in found.items():
        more, dearer = (ours / theirs for ours, theirs in zip((less, flops), found[UNIFORM], strict=True))
        lines.append(line([name, f"{less:.4f}", f"{more:.2f}", f"{dearer:.2f}", f"{more / dearer:.2f}"]))
    return lines


def _draws(found: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Chances of the layers."""
    scores, worth = found["scores"], worths(found)
    default = probabilities(scores, 1.0, "mean")
    return {
        UNIFORM: [1 / len(scores)] * len(scores),
        DEFAULT: default,
        "by gradient RMS, temperature 0.25": probabilities(scores, 0.25, "mean"),
        "by gradient RMS, temperature 1, over the cost of the step to the power 8 (`cost_weight` 8)": _per_cost(
            default, 8
        ),
        "the layer of largest gradient RMS": [float(score == max(scores)) for score in scores],
        BEST: [float(value == max(worth)) for value in worth],
    }


def _per_cost(chances: Sequence[float], power: int) -> list[float]:
    """A step on layer l alone, in units of one layer's forward pass: L forward, L - l of gradients down to it, 1 for its weights."""
    weights = [chance / (2 * len(chances) - layer + 1) ** power for layer, chance in enumerate(chances)]
    return [weight / sum(weights) for weight in weights]


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
