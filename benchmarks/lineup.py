# SPDX-License-Identifier: Apache-2.0
"""The lines of the cpu suite's tables: rows of one method in one setting, and ratios between them."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.methods import METHODS
from benchmarks.models import RANDOM

Row = dict[str, Any]


class Setting(NamedTuple):
    """What a line is of; settings that differ in method and stage alone are comparable."""

    method: str
    stage: int
    offload: str | None = None
    accumulation: int = 1
    checkpointing: bool = False
    prepare_state: bool = False

    @property
    def label(self) -> str:
        """Name of the method and what is not as by default."""
        changed = [f"offload `{self.offload}`"] if self.offload is not None else []
        changed += [f"accumulation {self.accumulation}"] if self.accumulation != 1 else []
        changed += ["gradient checkpointing"] if self.checkpointing else []
        changed += ["state of all layers made beforehand"] if self.prepare_state else []
        return "; ".join([METHODS[self.method].label, *changed])


def setting(row: Row) -> Setting:
    return Setting(*(row[name] for name in Setting._fields))


def compared(rows: Sequence[Row]) -> list[Row]:
    """Rows of the suite's one real model; those of growing shapes are a table of their own."""
    return [row for row in rows if not row["model"].startswith(RANDOM)]


def growing(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["model"].startswith(RANDOM)]


def lines_of(rows: Sequence[Row]) -> Iterator[tuple[Setting, list[Row]]]:
    """Settings with their rows: first the methods as they are by default, then the variants."""
    names = list(METHODS)

    def rank(one: Setting) -> tuple[Any, ...]:
        variant = one != Setting(one.method, one.stage)
        return (
            variant,
            one.prepare_state,
            one.accumulation,
            one.checkpointing,
            names.index(one.method),
            one.stage,
            one.offload or "",
        )

    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(setting(row), []).append(row)
    yield from ((one, found[one]) for one in sorted(found, key=rank))


def ratios(
    mine: Sequence[Row], rows: Sequence[Row], method: str, stage: int, measure: Callable[[Row], float]
) -> list[float]:
    """A measure of each row over that of ``method`` in the same round, with the same accumulation and checkpointing."""
    bases = {
        (row["seed"], row["accumulation"], row["checkpointing"]): row
        for row in rows
        if setting(row)[:3] == (method, stage, None) and not row["prepare_state"]
    }
    keys = [(row["seed"], row["accumulation"], row["checkpointing"]) for row in mine]
    return [measure(row) / measure(bases[key]) for key, row in zip(keys, mine, strict=True) if key in bases]


def step_seconds(row: Row) -> float:
    """What a step takes, on average over the draws; probing apart."""
    return statistics.fmean(row["seconds"])


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median, and the least and the largest if they are more than one."""
    if not values:
        return ""
    median = f"{statistics.median(values):.{digits}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{digits}f} to {max(values):.{digits}f})"
