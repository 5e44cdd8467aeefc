"""What happens beside training: its numbers before and after, its last checkpoint, what the terminal or a log file shows of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grass_ds.core.durable_files import replace_file
from launch import report

_ACTIVE = "grass/active_layers"
_SHOWN = ("loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second")


class Stopwatch(TrainerCallback):
    """Measures the model when the engine stands but nothing is trained, saves it when training is over, and times the training alone.

    Not before: in ZeRO-3 nobody can run the model until the engine gathers its weights. What was measured is kept in a file: a run that is
    resumed has no untrained model any more.

    The model is saved in the very step that ends training, on all ranks at once: the log line of that step, its checkpoint and everything after
    it may fail.

    Args:
        measure: what to measure before training.
        kept: the file for it.
        save: saves the model; all ranks call it.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], kept: Path, save: Callable[[], None]) -> None:
        self._measure = measure
        self._kept = kept
        self._save = save
        self.before: dict[str, float] = {}
        self.before_seconds = 0.0
        self.seconds = 0.0
        self.saving_seconds = 0.0
        self.saved = False
        self.peak_memory = 0
        self.first_step = 0
        self._start = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure, then start."""
        self.first_step = state.global_step
        if self.first_step == 0:
            begin = time.perf_counter()
            self.before = self._measure()
            self.before_seconds = time.perf_counter() - begin
            if state.is_world_process_zero:
                self._kept.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._kept, json.dumps(self.before))
        elif self._kept.is_file():
            self.before = json.loads(self._kept.read_text())
        report.reset_peak_memory()
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save after the last step."""
        if state.global_step >= state.max_steps:
            self.save()

    def save(self) -> None:
        """Save the model as it is now, and note the peak of memory until then."""
        self.peak_memory = report.own_peak_memory()
        begin = time.perf_counter()
        self._save()
        self.saved = True
        self.saving_seconds += time.perf_counter() - begin

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._start - self.saving_seconds


class LastCheckpoint(TrainerCallback):
    """A checkpoint of the last step, for a run that is to be resumed when it is interrupted: measuring and saving the model may take long."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for it. A resume from it trains no step more."""
        if state.global_step >= state.max_steps:
            control.should_save = True


def shown(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The few values that a reader of the terminal follows."""
    picked = {key: logs[key] for key in logs if key in _SHOWN}
    if _ACTIVE in logs:
        picked["active_layers"] = logs[_ACTIVE]
    return picked


class TerminalProgress(ProgressCallback):
    """The Trainer's progress bar, with `shown` for its log lines."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print a training step's line above the bar."""
        if logs and "loss" in logs:
            super().on_log(args, state, control, logs=shown(logs), **kwargs)


class TerminalLines(TrainerCallback):
    """The same without the bar, for log files (--disable_tqdm): one line per log, on global rank 0."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Print a training step's line."""
        if logs and "loss" in logs and state.is_world_process_zero:
            values = [
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in shown(logs).items()
            ]
            print(f"step {state.global_step} of {state.max_steps}: {', '.join(values)}", flush=True)
