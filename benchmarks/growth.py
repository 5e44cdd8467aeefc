# SPDX-License-Identifier: Apache-2.0
"""How cost grows with layers, active layers, ranks, chunk size and vocabulary: one number at a time, on small random shapes."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.floors import wire_bytes
from benchmarks.models import RANDOM, random_shape
from benchmarks.places import header, line
from benchmarks.plots import log_log

Cell = dict[str, Any]
Row = dict[str, Any]
LABELS = {
    "full": "full",
    "grass": "grass",
    "grass-head": "grass, head active",
    "grass-embed": "grass, embeddings and head active",
}
# Where the other numbers stand while one is varied.
REFERENCE = {"layers": 12, "gamma": 2, "ranks": 2, "chunk": 4 * 1024**2, "vocab": 32 * 1024}


@dataclass(frozen=True)
class Axis:
    """A number that is varied: what it is, its values, and the methods that are measured."""

    number: str
    label: str
    values: tuple[int, ...]
    methods: tuple[str, ...]


AXES = (
    Axis("layers", "layers", (6, 12, 24, 48), ("full", "grass")),
    Axis("gamma", "active layers", (1, 2, 4, 8), ("grass",)),
    Axis("ranks", "ranks", (1, 2, 4, 8), ("full", "grass")),
    # The largest shard by far is that of the embeddings, so they have to train for chunks to matter.
    Axis("chunk", "elements per chunk", tuple(1024 * 2**n for n in (6, 8, 10, 12)), ("grass-embed",)),
    Axis(
        "vocab", "vocabulary", tuple(1024 * 2**n for n in (5, 6, 7, 8)), ("full", "grass", "grass-head", "grass-embed")
    ),
)
MEASURES: dict[str, Callable[[Row], float]] = {
    "seconds per step": lambda row: statistics.mean(row["seconds"]),
    "peak of live tensors, MB": lambda row: row["observed"]["peak_bytes"] / 1e6,
    "sent per step, MB": lambda row: wire_bytes(row["observed"]["traffic"]) / 1e6,
}


class Fit(NamedTuple):
    """y = c * x ** exponent by least squares on logarithms; ``residual``: root mean square of log(y / fit)."""

    exponent: float
    residual: float


def growth_cells() -> Iterator[Cell]:
    """Every point once, also where axes meet. A draw every other step: what a step costs depends on the layers drawn."""
    seen = []
    for axis in AXES:
        for value in axis.values:
            for method in axis.methods:
                cell = _cell(method, {**REFERENCE, axis.number: value})
                if cell not in seen:
                    seen.append(cell)
                    yield cell


def _cell(method: str, numbers: dict[str, int]) -> Cell:
    return {
        "kind": "cost",
        "method": method,
        "model": f"{RANDOM}layers={numbers['layers']},vocab={numbers['vocab']}",
        "stage": 2,
        "ranks": numbers["ranks"],
        "micro-batch": 2,
        "sequence": 128,
        "seed": 0,
        "steps": 4 if method == "full" else 12,
        "grass": {
            "sample_period": 2,
            "num_active_layers": numbers["gamma"],
            "offload": {"device": "cpu", "chunk_numel": numbers["chunk"]},
        },
    }


def numbers_of(row: Row) -> dict[str, int]:
    """Where the row stands on every axis."""
    shape, block = random_shape(row["model"]), row["grass"]
    return {
        "layers": shape["layers"],
        "gamma": block["num_active_layers"],
        "ranks": row["ranks"],
        "chunk": block["offload"]["chunk_numel"],
        "vocab": shape["vocab"],
    }


def along(axis: Axis, method: str, rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Value on the axis and row, by value; all other numbers at their reference."""
    found = []
    for row in rows:
        numbers = numbers_of(row)
        if row["method"] == method and {**numbers, axis.number: 0} == {**REFERENCE, axis.number: 0}:
            found.append((numbers[axis.number], row))
    return sorted(found, key=lambda point: point[0])


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """None for less than two values of x, or where y is zero somewhere."""
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, y in points):
        return None
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    slope, intercept = statistics.linear_regression(xs, ys)
    errors = [y - slope * x - intercept for x, y in zip(xs, ys, strict=True)]
    return Fit(slope, math.sqrt(statistics.fmean(error**2 for error in errors)))


def growth_table(rows: Sequence[Row]) -> list[str]:
    """One line per axis and method: what was measured at every value, and the exponent with its residual."""
    lines = header("number", "values", "method", *(title for name in MEASURES for title in (name, "exponent")))
    for axis in AXES:
        for method in axis.methods:
            points = along(axis, method, rows)
            if not points:
                continue
            cells = [axis.label, ", ".join(str(value) for value, _ in points), LABELS[method]]
            for measure in MEASURES.values():
                measured = [(value, measure(row)) for value, row in points]
                cells += [
                    ", ".join(f"{y:.3g}" if y < 100 else f"{y:.0f}" for _, y in measured),
                    _exponent(fit(measured)),
                ]
            lines.append(line(cells))
    return lines


def growth_note(rows: Sequence[Row]) -> str:
    shape = random_shape(RANDOM)
    return (
        f"Llama shapes with random weights: hidden {shape['hidden']}, intermediate {shape['intermediate']}, {shape['heads']} heads; where a "
        f"number is not varied, {', '.join(f'{axis.label} {REFERENCE[axis.number]}' for axis in AXES)}. ZeRO-2, micro-batch 2 x 128 on "
        "every rank, one row per point. y = c * x ^ exponent by least squares on logarithms; in brackets the root mean square of the "
        "residuals of log y. Of a cost with a part that does not grow, it is the exponent over this range. Peak: live tensors of a rank, "
        "host memory of the optimizer state apart. Ranks share this machine's cores: beyond their number, seconds grow because of that."
    )


def growth_images(rows: Sequence[Row]) -> list[str]:
    """Lines of RESULTS.md that show what :func:`draw_growth` draws."""
    return [f"![cost against {axis.label}](plots/{_file(axis)})" for axis in AXES if _panels(axis, rows)]


def draw_growth(rows: Sequence[Row], folder: Path) -> None:
    """Write one plot per axis that has two points or more."""
    for axis in AXES:
        if panels := _panels(axis, rows):
            log_log(folder / _file(axis), axis.label, panels)


def _panels(axis: Axis, rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Measure -> method with its exponent -> points; nothing where there is no line to draw."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, measure in MEASURES.items():
        for method in axis.methods:
            points = [(float(value), measure(row)) for value, row in along(axis, method, rows)]
            fitted = fit(points)
            if fitted is not None:
                panels.setdefault(name, {})[f"{LABELS[method]}: x^{fitted.exponent:.2f}"] = points
    return panels


def _file(axis: Axis) -> str:
    return f"growth-{axis.number}.png"


def _exponent(fitted: Fit | None) -> str:
    return "" if fitted is None else f"{fitted.exponent:.2f} ({fitted.residual:.2f})"
