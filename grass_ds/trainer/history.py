# SPDX-License-Identifier: Apache-2.0
"""The history of a run: which layers each optimizer step trained, in memory and in one small JSONL file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grass_ds.core.durable_files import replace_file


@dataclass(frozen=True)
class HistoryRow:
    """One optimizer step (or one probe step, which moves no weight).

    Attributes:
        step: the loop's step number, 1-based; the HF Trainer's `global_step`, which counts probe steps too.
        phase: "probe" | "train".
        active_layers: indices of the layers this step trained; every layer while probing.
        probabilities: p_l of the next draw as it stood before the step, one per layer.
        scores: m_l as it stood before the step, one per layer; None while there is none.
    """

    step: int
    phase: str
    active_layers: tuple[int, ...]
    probabilities: tuple[float, ...]
    scores: tuple[float, ...] | None

    @classmethod
    def observe(cls, handle: Any, step: int) -> "HistoryRow":
        """Read `engine.grass` BEFORE step number `step`: the engine draws the next set at the end of a step."""
        scores = None if handle.scores is None else _short(handle.scores)
        return cls(step, handle.phase, tuple(handle.active_layers), _short(handle.probabilities), scores)


def _short(values: Sequence[float]) -> tuple[float, ...]:
    """Six significant digits: enough for a plot, a third of the file."""
    return tuple(float(f"{value:.6g}") for value in values)


@dataclass
class History:
    """Which layers each step trained; append-only, each row also a line of a JSONL file.

    The first line describes the run, a later one holds the step and the fields that differ from the line before. A row
    is in the file when `append` returns. Write it on one process (global rank 0).
    """

    path: Path
    layers: tuple[str, ...]  # names in model order
    sampler: str
    num_active_layers: int  # gamma
    rows: list[HistoryRow] = field(default_factory=list)

    @classmethod
    def start(cls, path: Path, step: int = 0, **run: Any) -> "History":
        """Write the file of a run that begins or goes on after `step`: rows up to there, and the new `run`.

        Raises:
            ValueError: the file is damaged, or is of a model with other layers.
        """
        history = cls(path, **run)
        if step and path.exists():
            earlier = cls.load(path)
            if earlier.layers != history.layers:
                raise ValueError(
                    f"{path} is of a model that has {_describe(earlier.layers)}, but this run has "
                    f"{_describe(history.layers)}"
                )
            history.rows = [row for row in earlier.rows if row.step <= step]
        header = {name: getattr(history, name) for name in ("layers", "sampler", "num_active_layers")}
        pairs = zip(history.rows, [None, *history.rows], strict=False)
        replace_file(path, json.dumps(header) + "\n" + "".join(_line(row, previous) for row, previous in pairs))
        return history

    @classmethod
    def load(cls, path: Path) -> "History":
        """Read a history. A last line without its newline (a run killed while writing) is ignored.

        Raises:
            ValueError: a line is damaged; names the file and the line number.
        """
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        number = 1
        try:
            history = cls(path, **_from_json(lines[0]))
            values: dict[str, Any] = {}
            for line in lines[1:]:
                number += 1
                values |= _from_json(line)
                history.rows.append(HistoryRow(**values))
        except (ValueError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a grass history ({error})") from error
        return history

    def append(self, row: HistoryRow) -> None:
        """Add a row and write it."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row, self.rows[-1] if self.rows else None))
        self.rows.append(row)

    def visits(self) -> list[int]:
        """Training steps per layer; probe steps do not count."""
        counts = Counter(layer for row in self.rows if row.phase == "train" for layer in row.active_layers)
        return [counts[layer] for layer in range(len(self.layers))]


def _line(row: HistoryRow, previous: HistoryRow | None) -> str:
    fields = vars(row).items()
    changed = {name: value for name, value in fields if previous is None or value != getattr(previous, name)}
    return json.dumps(changed, separators=(",", ":")) + "\n"


def _from_json(line: str) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(line).items()}


def _describe(layers: Sequence[str]) -> str:
    return f"{len(layers)} layers ({layers[0]} ... {layers[-1]})"
