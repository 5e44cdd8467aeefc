"""What launch/train.py adds to the Trainer: its schedule, its numbers before and after, its lines on the terminal."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grass_ds.core.durable_files import replace_file
from launch import peak_memory

_ACTIVE = "grass/active_layers"
_SHOWN = ("loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second")


class GrassTrainer(Trainer):
    """The Trainer, with a learning-rate schedule over the steps that train, and an end that can be resumed.

    `max_steps` counts the probing steps too, but the engine does not advance the schedule in them: spread over all of
    `max_steps`, it would end that many steps early, at a learning rate above its last one.
    """

    def __init__(self, *args: Any, probe_steps_within: Callable[[int], int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.probe_steps_within = probe_steps_within

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """See `Trainer.create_scheduler`; without the probing steps."""
        updates = num_training_steps - self.probe_steps_within(num_training_steps)
        return super().create_scheduler(max(1, updates), optimizer)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train no step more after the last one: the Trainer asks only after each step whether to stop."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)


class Stopwatch(TrainerCallback):
    """Measures the model before training, times training, and saves the model at its end.

    It measures when the engine exists: with ZeRO-3 nobody can run the model until the engine gathers its weights. What
    was measured is kept in a file: a run that is resumed has no untrained model any more. The model is saved in the
    step that ends training, on all ranks at once: the log line of that step, its checkpoint and the rest may fail.

    Args:
        measure: what to measure before training.
        before_file: where its result is kept.
        save: saves the model; all ranks call it.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], before_file: Path, save: Callable[[], None]) -> None:
        self._measure = measure
        self._before_file = before_file
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
                self._before_file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(self._before_file, json.dumps(self.before))
        elif self._before_file.is_file():
            self.before = json.loads(self._before_file.read_text())
        peak_memory.reset()
        self._start = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save after the last step."""
        if state.global_step >= state.max_steps:
            self.save()

    def save(self) -> None:
        """Save the model as it is now, and keep the peak of memory until then."""
        self.peak_memory = peak_memory.own()
        begin = time.perf_counter()
        self._save()
        self.saved = True
        self.saving_seconds += time.perf_counter() - begin

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds = time.perf_counter() - self._start - self.saving_seconds


class LastCheckpoint(TrainerCallback):
    """Saves a checkpoint of the last step too, for a run that is interrupted while it measures or saves the model."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for the checkpoint."""
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
