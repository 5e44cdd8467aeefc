# SPDX-License-Identifier: Apache-2.0
"""Whether the scores that layers are drawn by still hold while training goes on."""

from collections.abc import Sequence
from itertools import groupby, takewhile
from statistics import fmean
from typing import Any

import numpy

from benchmarks.report.table import mean, table

Row = dict[str, Any]


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, without ties."""
    ranks = [numpy.argsort(numpy.argsort(values)) for values in (left, right)]
    return float(numpy.corrcoef(*ranks)[0, 1])


def trained_since_probing(active: Sequence[Sequence[int] | None], steps: int) -> set[int]:
    """Layers trained in the first ``steps`` steps, since the probing that the scores are from.

    Args:
        active: layers of every step, None if it probed.
    """
    if steps < len(active) and active[steps] is None:  # the next probing has begun, of which there are no scores yet
        while steps and active[steps - 1] is None:
            steps -= 1
    since = takewhile(lambda layers: layers is not None, reversed(active[:steps]))
    return {layer for layers in since for layer in layers or ()}


def staleness_tables(rows: Sequence[Row]) -> list[str]:
    """Rank correlation of scores with those measured again, and how far they are off, as training goes on."""
    lines = []
    for period, alike in groupby(sorted(rows, key=reprobe_period), key=reprobe_period):
        mine = list(alike)
        for step in sorted({found["step"] for row in mine for found in row["reprobes"]}):
            points = [(row, found) for row in mine for found in row["reprobes"] if found["step"] == step]
            lines.append({"period": str(period), "step": str(step), **_staleness(points)})
    names = {"`reprobe_period`": lambda line: line["period"], "step": lambda line: line["step"]}
    correlation = {
        **names,
        "scores drawn by": lambda line: mean(line["now"]),
        "first scores": lambda line: mean(line["first"]),
        "halves with each other": lambda line: mean(line["halves"]),
    }
    ratio = {
        **names,
        "layers trained since": lambda line: mean(line["met"], 0),
        "theirs: least, most": lambda line: _extremes(line["trained"]),
        "others: least, most": lambda line: _extremes(line["idle"]),
    }
    return [
        table("Staleness: rank correlation with true scores", lines, correlation),
        table("Staleness: scores over true scores", lines, ratio),
    ]


def reprobe_period(row: Row) -> int:
    return row["grass"].get("reprobe_period", 0)


def _staleness(points: Sequence[tuple[Row, Row]]) -> dict[str, Any]:
    """Figures of one step, over several rows."""
    found: dict[str, Any] = {name: [] for name in ("now", "first", "halves", "met", "trained", "idle")}
    for row, point in points:
        true = [fmean(pair) for pair in zip(*point["true"], strict=True)]
        found["now"].append(rank_correlation(point["scores"], true))
        found["first"].append(rank_correlation(row["reprobes"][0]["scores"], true))
        found["halves"].append(rank_correlation(*point["true"]))
        since = trained_since_probing(row["active"], point["step"])
        found["met"].append(len(since))
        for layer, (score, value) in enumerate(zip(point["scores"], true, strict=True)):
            # Both over their mean: that is what the draw sees.
            ratio = (score / fmean(point["scores"])) / (value / fmean(true))
            found["trained" if layer in since else "idle"].append(ratio)
    return found


def _extremes(values: Sequence[float]) -> str:
    return f"{min(values):.2f}, {max(values):.2f}" if values else ""
