# SPDX-License-Identifier: Apache-2.0
"""Lines of the cost tables: rows of one method in one setting, and ratios to other methods in the same round."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks import cost_model
from benchmarks.methods import METHODS
from benchmarks.precision import STATE

Row = dict[str, Any]
Measure = Callable[[Row], float]


class Setting(NamedTuple):
    """What a line is of."""

    method: str
    stage: int
    offload: str | None = None
    accumulation: int = 1
    checkpointing: bool = False
    prepare_state: bool = False

    @property
    def label(self) -> str:
        """The method, and what differs from the defaults."""
        parts = [self.method]
        parts += [self.offload if self.offload != "none" else "offload none"] if self.offload is not None else []
        parts += [f"accumulation {self.accumulation}"] if self.accumulation != 1 else []
        parts += ["checkpointing"] if self.checkpointing else []
        parts += ["all state made"] if self.prepare_state else []
        return ", ".join(parts)

    @property
    def order(self) -> tuple[Any, ...]:
        """Methods in their defaults first, then the variants."""
        variant = self != Setting(self.method, self.stage)
        settings = (variant, self.prepare_state, self.accumulation, self.checkpointing)
        return (*settings, list(METHODS).index(self.method), self.stage, self.offload or "")


def setting(row: Row) -> Setting:
    return Setting(*(row[name] for name in Setting._fields))


@dataclass(frozen=True)
class RowGroup:
    """Rows of one setting, beside all rows that they are compared with."""

    setting: Setting
    rows: list[Row]
    table: Sequence[Row]

    def values(self, measure: Measure) -> list[float]:
        return [measure(row) for row in self.rows]

    def every(self, name: str) -> list[Any]:
        """The values of all steps of a field that has one per step."""
        return [value for row in self.rows for value in row[name]]

    def ratios(self, method: str, stage: int, measure: Measure) -> list[float]:
        """To that method in the same round, with the same accumulation and checkpointing."""
        bases = {
            _round(row): row
            for row in self.table
            if setting(row)[:3] == (method, stage, None) and not row["prepare_state"]
        }
        return [measure(row) / measure(bases[_round(row)]) for row in self.rows if _round(row) in bases]


def group_rows(rows: Sequence[Row]) -> list[RowGroup]:
    """One group per setting, methods in their defaults first."""
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(setting(row), []).append(row)
    return [RowGroup(one, found[one], rows) for one in sorted(found, key=lambda one: one.order)]


def _round(row: Row) -> tuple[int, int, bool]:
    return row["seed"], row["accumulation"], row["checkpointing"]


# ---- measures of a row ---------------------------------------------------------------------------------------------


def step_seconds(row: Row) -> float:
    """Mean over the draws of a round; without probing."""
    return statistics.fmean(row["seconds"])


def live_peak(row: Row) -> float:
    """Bytes of tensors of a rank at the peak of a step: what a GPU would hold, on the CPU too."""
    return row["observed"]["peak_bytes"]


def memory_ratio(row: Row) -> float:
    """Peak of live tensors over the cost model's."""
    return live_peak(row) / cost_model.memory(row, row["observed"]["active"])["total"]


def above_imports(row: Row) -> float:
    """Peak resident bytes while training, minus those after the imports."""
    return row["train_peak_bytes"] - row["baseline_bytes"]


def host_state(row: Row) -> float:
    """Bytes of Adam state of a rank once all layers have trained; in host memory by default. 0 for other methods."""
    if METHODS[row["method"]].grass is None:
        return 0.0
    shape = row["shape"]
    return STATE * (shape["layers"] * shape["layer_numel"] + shape["norm_numel"]) / row["ranks"]
