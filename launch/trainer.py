"""The Trainer of launch/train.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Trainer


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
        """Not a step more for a run that is resumed from its last one: the Trainer asks only after each step whether to stop."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
