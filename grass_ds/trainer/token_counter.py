# SPDX-License-Identifier: Apache-2.0
"""How many tokens a Trainer's model has read."""

from typing import Any

import torch


class TokenCounter:
    """Input tokens of all ranks per optimizer step: the Trainer's own count if it keeps one, else a forward hook's.

    Args:
        model: the one that trains.
        state: the Trainer's `TrainerState`.
        args: the Trainer's `TrainingArguments`.
    """

    def __init__(self, model: torch.nn.Module | None, state: Any, args: Any) -> None:
        self._tracked = args.include_num_input_tokens_seen not in (False, "no")  # a bool before transformers 4.57
        self._seen = state.num_input_tokens_seen if self._tracked else 0
        self._ranks = args.world_size
        self._counted = 0
        self._hook = None
        if not self._tracked and model is not None:
            self._input_name = getattr(model, "main_input_name", "input_ids")
            self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def take(self, state: Any) -> int:
        """Tokens since the previous call."""
        if self._tracked:
            tokens = state.num_input_tokens_seen - self._seen
            self._seen = state.num_input_tokens_seen
        else:
            tokens = self._counted * self._ranks
            self._counted = 0
        return tokens

    def remove(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    def _count(self, module: torch.nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get(self._input_name, inputs[0] if inputs else None)
        if module.training and isinstance(tokens, torch.Tensor):
            self._counted += tokens.numel()
