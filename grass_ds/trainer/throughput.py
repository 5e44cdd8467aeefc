# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of training."""

from time import perf_counter
from typing import Any

import torch


class Throughput:
    """Input tokens of all ranks per second of training: evaluation, checkpoints and other pauses do not count.

    Call `start()` before the first step and after every pause, `step(state)` after every optimizer step, `close()` at
    the end. `state` and `args` are the Trainer's, which counts with `include_num_input_tokens_seen`. Otherwise a
    forward hook counts the tokens of this rank, padding included, and multiplies by the number of ranks.
    """

    def __init__(self, model: torch.nn.Module, state: Any, args: Any) -> None:
        # A bool before transformers 4.57.
        self._trainer_counts = args.include_num_input_tokens_seen not in (False, "no")
        self._counted = 0
        self._ranks = args.world_size
        self._input_name = getattr(model, "main_input_name", "input_ids")
        self.close = model.register_forward_pre_hook(self._count, with_kwargs=True).remove
        self._total = self._first = self._reported = (self._tokens(state), 0.0)  # tokens, seconds
        self.start()

    def start(self) -> None:
        """Restart the clock: the time since the last `step` does not count."""
        self._since = perf_counter()

    def step(self, state: Any) -> None:
        """Count one optimizer step."""
        now = perf_counter()
        self._total = (self._tokens(state), self._total[1] + now - self._since)
        self._since = now

    def interval(self) -> float | None:
        """Tokens per second since the previous call; None if no step was taken since."""
        rate = self._rate_since(self._reported)
        self._reported = self._total
        return rate

    @property
    def average(self) -> float | None:
        """Tokens per second over all steps so far; None before the first."""
        return self._rate_since(self._first)

    def _rate_since(self, earlier: tuple[int, float]) -> float | None:
        tokens, seconds = self._total[0] - earlier[0], self._total[1] - earlier[1]
        return tokens / seconds if seconds > 0 else None

    def _tokens(self, state: Any) -> int:
        return int(state.num_input_tokens_seen) if self._trainer_counts else self._counted

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get(self._input_name, inputs[0] if inputs else None)
        if module.training and isinstance(tokens, torch.Tensor):
            self._counted += tokens.numel() * self._ranks
