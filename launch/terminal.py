"""What a person at the terminal, or a log file, sees of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_ACTIVE = "grass/active/"
_SHOWN = ("loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second")


def shown(logs: Mapping[str, Any]) -> dict[str, Any]:
    """The few values that a reader of the terminal follows; GRASS's hundred per step, which go to --report_to, as the active layers."""
    picked = {key: logs[key] for key in logs if key in _SHOWN}
    layers = [key for key in logs if key.startswith(_ACTIVE)]
    active = [key.rsplit("/", 1)[-1] for key in layers if logs[key]]
    if active:
        picked["active_layers"] = " ".join(active) if len(active) < len(layers) else "all"
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
