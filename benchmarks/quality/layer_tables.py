# SPDX-License-Identifier: Apache-2.0
"""Whether layers with large gradients bring most: tables of the layers that were trained alone."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cost_model
from benchmarks.quality.staleness import rank_correlation
from benchmarks.report.table import table
from grass_ds.sampling.importance import probabilities

Row = dict[str, Any]
UNIFORM = "uniformly"


def decreases(found: Mapping[str, Any]) -> list[float]:
    """How much each layer lowers the loss, in nats."""
    return [found["before"] - loss for loss in found["losses"]]


def expected_decreases(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """By how one layer is drawn: expected decrease of the loss, in nats, and FLOPs of a step; means over the seeds.

    The figures of one seed draw, those of the next are what the layer brings, or the best would be the luckiest.
    """
    draws = [_draws(row["worth"]) for row in rows]
    brought = [decreases(row["worth"]) for row in (*rows[1:], rows[0])]
    flops = [[cost_model.flops(row, [layer]) for layer in range(len(row["worth"]["scores"]))] for row in rows]
    found = {}
    for name in draws[0]:
        chances = [drawn[name] for drawn in draws]
        found[name] = (
            statistics.fmean(map(_expected, chances, brought)),
            statistics.fmean(map(_expected, chances, flops)),
        )
    return found


def layer_tables(rows: Sequence[Row]) -> list[str]:
    """What one layer brings by how it is drawn, and how figures agree."""
    found = expected_decreases(rows)
    less, flops = found[UNIFORM]
    brings = {
        "one layer drawn": lambda name: name,
        "loss less by, nats": lambda name: f"{found[name][0]:.4f}",
        "of uniform": lambda name: f"{found[name][0] / less:.2f}",
        "FLOPs, of uniform": lambda name: f"{found[name][1] / flops:.2f}",
        "per FLOP, of uniform": lambda name: f"{found[name][0] / less / (found[name][1] / flops):.2f}",
    }
    measured = [row["worth"] for row in rows]
    agreement = [rank_correlation(one["scores"], decreases(one)) for one in measured]
    correlations = {"gradient RMS with loss decrease": statistics.fmean(agreement)}
    if len(measured) > 1:
        first, second = measured[:2]
        correlations["gradient RMS of two seeds"] = rank_correlation(first["scores"], second["scores"])
        correlations["loss decreases of two seeds"] = rank_correlation(decreases(first), decreases(second))
    return [
        table("One layer trained alone: loss decrease", found, brings),
        table(
            "One layer trained alone: rank correlations",
            correlations.items(),
            {"of all layers": lambda pair: pair[0], "correlation": lambda pair: f"{pair[1]:+.2f}"},
        ),
    ]


def _draws(found: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    """Chances of the layers."""
    scores, brought = found["scores"], decreases(found)
    default = probabilities(scores, 1.0, "mean")
    return {
        UNIFORM: [1 / len(scores)] * len(scores),
        "by gradient, temperature 1 (default)": default,
        "by gradient, temperature 0.25": probabilities(scores, 0.25, "mean"),
        "default, over cost ** 8 (`cost_weight`)": _over_cost(default, 8),
        "largest gradient": [float(score == max(scores)) for score in scores],
        "largest loss decrease": [float(value == max(brought)) for value in brought],
    }


def _over_cost(chances: Sequence[float], power: int) -> list[float]:
    """Cost of a step on one layer, in forward passes of a layer: all forward, gradients down to it, its weights."""
    weights = [chance / (2 * len(chances) - layer + 1) ** power for layer, chance in enumerate(chances)]
    return [weight / sum(weights) for weight in weights]


def _expected(chances: Sequence[float], values: Sequence[float]) -> float:
    return sum(chance * value for chance, value in zip(chances, values, strict=True))
