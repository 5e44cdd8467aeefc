# SPDX-License-Identifier: Apache-2.0
"""Runs as the rows of a table, and tables as text."""

from collections.abc import Callable, Sequence

from grass_ds.compare.saved_run import SavedRun


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _size(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


COLUMNS: dict[str, Callable[[SavedRun], str]] = {
    "run": lambda run: run.name,
    "method": lambda run: run.method or "",
    "ZeRO": lambda run: _whole(run.stage),
    "model": lambda run: run.model or "",
    "steps": lambda run: _whole(run.steps),
    "loss before": lambda run: _loss(run.loss_before),
    "loss after": lambda run: _loss(run.loss_after),
    "accuracy before": lambda run: _share(run.accuracy_before),
    "accuracy after": lambda run: _share(run.accuracy_after),
    "seconds": lambda run: _whole(run.seconds),
    "tokens/s": lambda run: _whole(run.tokens_per_second),
    "device bytes": lambda run: _size(run.device_bytes),
    "peak memory": lambda run: _size(run.peak_memory),
}
"""Heading -> the cell of a run; empty where the run does not have it."""


def rows(runs: Sequence[SavedRun]) -> list[list[str]]:
    """One row per run, with a cell for each of :data:`COLUMNS`."""
    return [[cell(run) for cell in COLUMNS.values()] for run in runs]


def as_text(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, its columns aligned. Control characters become escapes: cells come from files."""
    lines = [[_printable(cell) for cell in row] for row in (headings, *cells)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def _printable(cell: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cell)
