# SPDX-License-Identifier: Apache-2.0
"""The history of a run: which layers each optimizer step trained, in memory and in one small JSONL file."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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


class History:
    """Which layers each step trained; append-only, each row also a line of a JSONL file.

    The first line describes the run; a later line holds the step and only those fields that differ from the line
    before, so that 5,000 steps of a 30-layer model take well under a megabyte. Every row is on disk when `append`
    returns, and no file stays open, so that an instance can be pickled and a killed run loses nothing. Write it on one
    process (global rank 0).

    Attributes:
        path: the JSONL file.
        layers: layer names in model order.
        sampler: name of the sampler, for titles.
        num_active_layers: gamma, for titles.
        rows: the rows so far, steps strictly increasing.
    """

    FIELDS = ("phase", "active_layers", "probabilities", "scores")

    def __init__(self, path: str | Path, *, layers: Sequence[str], sampler: str, num_active_layers: int) -> None:
        """Describe an empty history; nothing is written before `create`, `resume` or `append`."""
        self.path = Path(path)
        self.layers = tuple(layers)
        self.sampler = sampler
        self.num_active_layers = num_active_layers
        self.rows: list[HistoryRow] = []

    @classmethod
    def create(cls, path: str | Path, *, layers: Sequence[str], sampler: str, num_active_layers: int) -> "History":
        """Start a new file, replacing one that an earlier run left there."""
        history = cls(path, layers=layers, sampler=sampler, num_active_layers=num_active_layers)
        history._rewrite()
        return history

    @classmethod
    def resume(
        cls, path: str | Path, step: int, *, layers: Sequence[str], sampler: str, num_active_layers: int
    ) -> "History":
        """Re-open the file of a run that goes on after `step`: later rows are dropped, since they are trained again.

        Starts a new file if there is none (a checkpoint moved without it). The sampler may have changed; the file then
        names the new one.

        Raises:
            ValueError: the file is damaged, or is of a model with other layers.
        """
        history = cls(path, layers=layers, sampler=sampler, num_active_layers=num_active_layers)
        if history.path.exists():
            earlier = cls.load(history.path)
            if earlier.layers != history.layers:
                raise ValueError(
                    f"{history.path} is of a model of {len(earlier.layers)} layers {_ends(earlier.layers)}, but "
                    f"this run has {len(history.layers)} layers {_ends(history.layers)}"
                )
            history.rows = [row for row in earlier.rows if row.step <= step]
        history._rewrite()
        return history

    @classmethod
    def load(cls, path: str | Path) -> "History":
        """Read a history. A last line without its newline (a run killed while writing) is ignored.

        Raises:
            ValueError: a line is not what `append` writes; names the file and the line number.
        """
        lines = Path(path).read_text(encoding="utf-8").split("\n")[:-1]
        number = 1
        try:
            history = cls(path, **json.loads(lines[0]))
            values: dict[str, Any] = {}
            for line in lines[1:]:
                number += 1
                values.update(_from_json(json.loads(line)))
                history._push(HistoryRow(**values))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: not a grass history ({error})") from error
        return history

    def append(self, row: HistoryRow) -> None:
        """Add a row and write it.

        Raises:
            ValueError: `row.step` is not above the last step in the history.
        """
        previous = self.rows[-1] if self.rows else None
        self._push(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row, previous))

    def visits(self) -> list[int]:
        """Training steps per layer; probe steps do not count."""
        counts = [0] * len(self.layers)
        for row in self.rows:
            if row.phase == "train":
                for index in row.active_layers:
                    counts[index] += 1
        return counts

    def _push(self, row: HistoryRow) -> None:
        if self.rows and row.step <= self.rows[-1].step:
            raise ValueError(f"step {row.step} follows step {self.rows[-1].step}: steps must increase")
        self.rows.append(row)

    def _rewrite(self) -> None:
        """Write the whole file beside the old one, then replace it, so that a kill leaves one or the other."""
        header = {"layers": self.layers, "sampler": self.sampler, "num_active_layers": self.num_active_layers}
        previous = [None, *self.rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
            file.writelines(_line(row, before) for row, before in zip(self.rows, previous, strict=False))
        os.replace(partial, self.path)


def _line(row: HistoryRow, previous: HistoryRow | None) -> str:
    changed = {"step": row.step}
    for name in History.FIELDS:
        value = getattr(row, name)
        if previous is None or value != getattr(previous, name):
            changed[name] = value
    return json.dumps(changed, separators=(",", ":")) + "\n"


def _from_json(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def _ends(names: Sequence[str]) -> str:
    return f"({names[0]} ... {names[-1]})" if names else "()"
