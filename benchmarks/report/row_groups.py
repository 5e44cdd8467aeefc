# SPDX-License-Identifier: Apache-2.0
"""Lines of the cost tables: rows of one method in one setting, and ratios to other methods in the same round."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import cost_model
from benchmarks.case import Row
from benchmarks.methods import METHODS
from benchmarks.offload.suite import OFFLOADS
from benchmarks.precision import STATE

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
        parts = {
            self.method: True,
            "offload none" if self.offload == "none" else self.offload: self.offload is not None,
            f"accumulation {self.accumulation}": self.accumulation != 1,
            "checkpointing": self.checkpointing,
            "all state made": self.prepare_state,
        }
        return ", ".join(str(part) for part, differs in parts.items() if differs)

    @property
    def order(self) -> tuple[Any, ...]:
        """Methods in their defaults first, then the variants."""
        variant = self != Setting(self.method, self.stage)
        offload = [None, *OFFLOADS].index(self.offload)
        method = list(METHODS).index(self.method)
        return variant, self.prepare_state, self.accumulation, self.checkpointing, method, self.stage, offload


def setting(row: Row) -> Setting:
    """Rows older than a field have its default."""
    return Setting(**{name: row[name] for name in Setting._fields if name in row})


def pairs_by_seed(rows: Sequence[Row], base: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Each row with that of the base with the same seed, where there is one."""
    others = {row["seed"]: row for row in base}
    return [(row, others[row["seed"]]) for row in rows if row["seed"] in others]


class RowGroup(NamedTuple):
    """Rows of one setting, beside all rows that they are compared with."""

    setting: Setting
    rows: list[Row]
    table: Sequence[Row]

    def values(self, measure: Measure) -> list[float]:
        return [measure(row) for row in self.rows]

    def every(self, name: str) -> list[Any]:
        """The values of all steps of a field that has one per step."""
        return [value for row in self.rows for value in row.get(name, ())]

    def pairs(self, method: str, stage: int, offload: str | None = None) -> list[tuple[Row, Row]]:
        """Each row with that method's in the same round, with the same accumulation and checkpointing."""
        others = {_round(row): row for row in self.table if setting(row)[:3] == (method, stage, offload)}
        return [(row, others[_round(row)]) for row in self.rows if _round(row) in others]

    def ratios(self, method: str, stage: int, measure: Measure) -> list[float]:
        """Over that method's, one per round."""
        return [measure(row) / measure(other) for row, other in self.pairs(method, stage)]

    def differences(self, method: str, stage: int, measure: Measure) -> list[float]:
        """From that method's, one per round."""
        return [measure(row) - measure(other) for row, other in self.pairs(method, stage)]


def group_rows(rows: Sequence[Row]) -> list[RowGroup]:
    """One group per setting, methods in their defaults first."""
    settings = sorted(set(map(setting, rows)), key=lambda one: one.order)
    return [RowGroup(one, [row for row in rows if setting(row) == one], rows) for one in settings]


def _round(row: Row) -> tuple[int, int, bool]:
    return row["seed"], row["accumulation"], row["checkpointing"]


# ---- measures of a row ---------------------------------------------------------------------------------------------


def step_seconds(row: Row) -> float:
    """Mean over the draws of a round; without probing."""
    return statistics.fmean(row["seconds"])


def tokens(row: Row) -> int:
    """Tokens of an optimizer step, all ranks."""
    return row["ranks"] * row["micro_batch"] * row["accumulation"] * row["sequence"]


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
