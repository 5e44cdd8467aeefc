# SPDX-License-Identifier: Apache-2.0
"""What a run reports about itself: scalars for a dashboard, a record of every optimizer step, tokens per second.

Nothing here knows the HF Trainer, wandb or DeepSpeed: `grass_metrics` and `grass_summary` read `engine.grass`, `History` writes one small
JSONL file, `Throughput` is a clock. `grass_ds.trainer.callback` connects them to a Trainer; a hand-written loop may use them as is.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = {"probe": 0.0, "train": 1.0}
"""Value of `grass/phase` for each phase name."""


def grass_metrics(handle: Any) -> dict[str, float]:
    """Describe `engine.grass` as flat scalars, for any logger.

    The values are read now: after `engine.step()` they describe the set of layers that the NEXT step trains. `<layer>`
    is the layer's index, zero-padded so that dashboards which sort by name keep the layers in order.

    | key | value |
    |---|---|
    | `grass/phase` | 0 while probing, 1 while training |
    | `grass/active/<layer>` | 1 if the layer is in the active set A_t, else 0 (1 for every layer while probing) |
    | `grass/score/<layer>` | importance m_l (mean gradient norm); absent while there is none |
    | `grass/prob/<layer>` | p_l of the next draw |
    | `grass/visits/<layer>` | optimizer steps in which the layer was trained |
    | `grass/bytes/<category>/<place>` | bytes held by this rank: weights, gradients, optimizer_state on device, host (and nvme) |
    | `grass/checkpoint/stall_seconds` | that training stood still for the last checkpoint; absent before the first |
    | `grass/checkpoint/bytes` | of it on this rank's account, as far as written |

    Args:
        handle: `engine.grass`.

    Returns:
        Python floats only; the same keys on every rank. No communication.
    """
    active = frozenset(handle.active_layers)
    num_layers = len(handle.layers)
    metrics = {"grass/phase": PHASES[handle.phase]}
    columns: list[tuple[str, Sequence[float]]] = [("active", [float(i in active) for i in range(num_layers)])]
    if handle.scores is not None:
        columns.append(("score", handle.scores))
    columns += [("prob", handle.probabilities), ("visits", handle.visits)]
    width = max(2, len(str(num_layers - 1)))
    for name, values in columns:
        metrics.update({f"grass/{name}/{i:0{width}d}": float(value) for i, value in enumerate(values)})
    for category, places in handle.memory().items():
        metrics.update({f"grass/bytes/{category}/{place}": float(size) for place, size in places.items()})
    if handle.checkpoint is not None:
        metrics["grass/checkpoint/stall_seconds"] = handle.checkpoint.stall_seconds
        metrics["grass/checkpoint/bytes"] = float(handle.checkpoint.bytes)
    return metrics


def grass_summary(handle: Any) -> dict[str, float | str]:
    """Describe `engine.grass` in a handful of values that do not grow with the model, for a log line.

    As `grass_metrics`, it tells of the NEXT step.

    | key | value |
    |---|---|
    | `grass/phase` | 0 while probing, 1 while training |
    | `grass/active_layers` | indices of the layers in the active set A_t, as text ("3 17"), or "all" |
    | `grass/bytes/<place>` | bytes held by this rank on device, host (and nvme) |
    | `grass/checkpoint/stall_seconds` | that training stood still for the last checkpoint; absent before the first |

    Args:
        handle: `engine.grass`.

    Returns:
        Floats and one text; the same keys on every rank. No communication.
    """
    active = sorted(handle.active_layers)
    everything = len(active) == len(handle.layers)
    summary: dict[str, float | str] = {
        "grass/phase": PHASES[handle.phase],
        "grass/active_layers": "all" if everything else " ".join(map(str, active)),
    }
    sizes: Counter[str] = Counter()
    for places in handle.memory().values():
        sizes.update(places)
    summary.update({f"grass/bytes/{place}": float(size) for place, size in sizes.items()})
    if handle.checkpoint is not None:
        summary["grass/checkpoint/stall_seconds"] = handle.checkpoint.stall_seconds
    return summary


class Throughput:
    """Tokens per second of training alone: evaluation, checkpoints and other pauses do not count.

    Call `start()` before the first step and after every pause, `step(tokens)` after every optimizer step.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._tokens = self._interval_tokens = 0
        self._seconds = self._interval_seconds = 0.0

    def start(self) -> None:
        """Time from here on counts as training; time since the last `step` does not."""
        self._since = self._clock()

    def step(self, tokens: int) -> None:
        """Count one optimizer step that read `tokens` tokens (over all ranks)."""
        now = self._clock()
        self._interval_seconds += now - self._since
        self._interval_tokens += tokens
        self._since = now

    def interval(self) -> float | None:
        """Tokens per second since the previous call; None if no step was taken since."""
        rate = _rate(self._interval_tokens, self._interval_seconds)
        self._tokens += self._interval_tokens
        self._seconds += self._interval_seconds
        self._interval_tokens, self._interval_seconds = 0, 0.0
        return rate

    @property
    def average(self) -> float | None:
        """Tokens per second over all steps so far; None before the first."""
        return _rate(self._tokens + self._interval_tokens, self._seconds + self._interval_seconds)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds > 0 else None


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
    """Append-only record of which layers each step trained, mirrored line by line in a JSONL file.

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
                    f"{history.path} records a model of {len(earlier.layers)} layers {_ends(earlier.layers)}, but "
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
            ValueError: `row.step` is not above the last recorded step.
        """
        previous = self.rows[-1] if self.rows else None
        self._push(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row, previous))

    def visits(self) -> list[int]:
        """Recorded training steps per layer; probe steps do not count."""
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
        """Write the whole file aside and move it into place, so that a kill leaves the old one or the new one."""
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
