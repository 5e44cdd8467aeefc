# SPDX-License-Identifier: Apache-2.0
"""How cost grows with layers, active layers, ranks, chunk size and vocabulary, one at a time, on random shapes."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.case import Case
from benchmarks.cost_model import wire_bytes
from benchmarks.models import RANDOM, random_shape
from benchmarks.report.table import table

Row = dict[str, Any]
# The values of the other numbers while one is varied.
REFERENCE = {"layers": 12, "gamma": 2, "ranks": 2, "chunk": 4 * 1024**2, "vocab": 32 * 1024}


@dataclass(frozen=True)
class Axis:
    """A number that is varied: its values, and the methods that are measured."""

    number: str
    label: str
    values: tuple[int, ...]
    methods: tuple[str, ...]


AXES = (
    Axis("layers", "layers", (6, 12, 24, 48), ("full", "grass")),
    Axis("gamma", "active layers", (1, 2, 4, 8), ("grass",)),
    Axis("ranks", "ranks", (1, 2, 4, 8), ("full", "grass")),
    # The embeddings have by far the largest shard, so they have to train for chunks to matter.
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


def growth_cases() -> Iterator[Case]:
    """Every point once, also where axes meet. A draw every other step, as a step costs what its layers cost."""
    seen = set()
    for axis in AXES:
        for value in axis.values:
            for method in axis.methods:
                case = _case(method, {**REFERENCE, axis.number: value})
                if case.text() not in seen:
                    seen.add(case.text())
                    yield case


def _case(method: str, numbers: dict[str, int]) -> Case:
    return Case(
        kind="cost",
        method=method,
        model=f"{RANDOM}layers={numbers['layers']},vocab={numbers['vocab']}",
        ranks=numbers["ranks"],
        steps=4 if method == "full" else 12,
        grass={
            "sample_period": 2,
            "num_active_layers": numbers["gamma"],
            "offload": {"device": "cpu", "chunk_numel": numbers["chunk"]},
        },
    )


def along(axis: Axis, method: str, rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Value on the axis and row, by value; all other numbers at their reference."""
    found = []
    for row in rows:
        numbers = _numbers(row)
        if row["method"] == method and {**numbers, axis.number: 0} == {**REFERENCE, axis.number: 0}:
            found.append((numbers[axis.number], row))
    return sorted(found, key=lambda point: point[0])


def _numbers(row: Row) -> dict[str, int]:
    shape, block = random_shape(row["model"]), row["grass"]
    return {
        "layers": shape["layers"],
        "gamma": block["num_active_layers"],
        "ranks": row["ranks"],
        "chunk": block["offload"]["chunk_numel"],
        "vocab": shape["vocab"],
    }


def fit(points: Sequence[tuple[float, float]]) -> Fit | None:
    """None for less than two values of x, or where y is zero somewhere."""
    if len({x for x, _ in points}) < 2 or any(y <= 0 for _, y in points):
        return None
    xs, ys = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    slope, intercept = statistics.linear_regression(xs, ys)
    errors = [y - slope * x - intercept for x, y in zip(xs, ys, strict=True)]
    return Fit(slope, math.sqrt(statistics.fmean(error**2 for error in errors)))


def growth_tables(rows: Sequence[Row]) -> list[str]:
    """A table per measure, a line per axis and method."""
    found = [(axis, method, along(axis, method, rows)) for axis in AXES for method in axis.methods]
    lines = [line for line in found if line[2]]
    return [_table(name, measure, lines) for name, measure in MEASURES.items()]


def _table(name: str, measure: Callable[[Row], float], lines: list[tuple[Axis, str, list[tuple[int, Row]]]]) -> str:
    measured = [(axis, method, [(value, measure(row)) for value, row in points]) for axis, method, points in lines]
    return table(
        f"Growth: {name}",
        [(*line, fit(line[2])) for line in measured],
        {
            "number": lambda line: line[0].label,
            "values": lambda line: ", ".join(str(value) for value, _ in line[2]),
            "method": lambda line: line[1],
            "measured": lambda line: ", ".join(f"{y:.3g}" if y < 100 else f"{y:.0f}" for _, y in line[2]),
            "exponent": lambda line: f"{line[3].exponent:.2f}" if line[3] else "",
            "residual": lambda line: f"{line[3].residual:.2f}" if line[3] else "",
        },
    )
