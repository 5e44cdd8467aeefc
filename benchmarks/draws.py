# SPDX-License-Identifier: Apache-2.0
"""What a run has drawn: how far from uniform, and how much of it another run has drawn, too."""

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def distance(row: Row) -> float | None:
    """Total variation between the sampler's distribution and the uniform one, in [0, 1]: the share of the draw that importance moves.

    Mean over the distributions that the run has had; None of methods without scores.
    """
    found = [_from_uniform(drawn["probabilities"]) for drawn in row.get("scores") or ()]
    return statistics.mean(found) if found else None


def alike(ours: Row, theirs: Row) -> float | None:
    """Share of the layers that ``theirs`` has trained, step by step, that ``ours`` has trained in the same step; probing apart.

    Samplers of one seed turn the same random numbers into layers, so it is not by chance alone. None of methods that do not draw, and
    of runs that are not as long as each other.
    """
    if not ours["active"] or len(ours["active"]) != len(theirs["active"]):
        return None
    pairs = [
        (set(mine), set(other))
        for mine, other in zip(ours["active"], theirs["active"], strict=True)
        if mine is not None and other is not None
    ]
    return sum(len(mine & other) for mine, other in pairs) / sum(len(other) for _, other in pairs) if pairs else None


def _from_uniform(probabilities: Sequence[float]) -> float:
    return sum(abs(p - 1 / len(probabilities)) for p in probabilities) / 2
