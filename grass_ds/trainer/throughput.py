# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of training."""

import time
from collections.abc import Callable
from typing import Any

import torch


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
        """Restart the clock: the time since the last `step` does not count."""
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


class TokenCounter:
    """Input tokens of all ranks per optimizer step, counted by the Trainer if it does, else by a forward hook.

    The Trainer counts only with `include_num_input_tokens_seen`, and no event hands the inputs to a callback.

    Args:
        model: the one that trains.
        state: the Trainer's `TrainerState`.
        args: the Trainer's `TrainingArguments`.
    """

    def __init__(self, model: torch.nn.Module | None, state: Any, args: Any) -> None:
        self._trainer_counts = args.include_num_input_tokens_seen not in (
            False,
            "no",
        )  # a bool before transformers 4.57
        self._total = state.num_input_tokens_seen if self._trainer_counts else 0
        self._taken = self._total
        self._ranks = args.world_size
        self._hook = None
        if not self._trainer_counts and model is not None:
            self._input_name = getattr(model, "main_input_name", "input_ids")
            self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def take(self, state: Any) -> int:
        """Tokens since the previous call."""
        if self._trainer_counts:
            self._total = state.num_input_tokens_seen
        tokens, self._taken = self._total - self._taken, self._total
        return tokens

    def remove(self) -> None:
        """Remove the hook from the model."""
        if self._hook is not None:
            self._hook.remove()

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get(self._input_name, inputs[0] if inputs else None)
        if module.training and isinstance(tokens, torch.Tensor):
            self._total += tokens.numel() * self._ranks
