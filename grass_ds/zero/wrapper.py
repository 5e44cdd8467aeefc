# SPDX-License-Identifier: Apache-2.0
"""The client optimizer as the engine, accelerate and the Trainer see it: param groups, loss scale, overflow."""

from typing import Any

import torch

from grass_ds.core import deepspeed_compat

MAX_CONSECUTIVE_SKIPS = 20


class OptimizerWrapper(deepspeed_compat.ZeROOptimizer):
    """The attributes that every ZeRO optimizer must have, whatever it does in a step.

    Attributes:
        overflow: the last step applied no update: gradients were not finite, or it was a probing step. Engine,
            accelerate and Trainer then do not advance the learning-rate schedule.
        skips: consecutive steps with non-finite gradients.
        in_forward: a forward pass that will be trained on is under way, or its backward has yet to begin. False in
            evaluation, and while backward recomputes activations.
    """

    in_forward = False

    def __init__(self, engine: deepspeed_compat.DeepSpeedEngine, optimizer: torch.optim.Optimizer, dtype: torch.dtype):
        super().__init__()
        self.engine = engine
        self.optimizer = optimizer
        self.device: torch.device = engine.device
        self.stage = engine.zero_optimization_stage()
        self.clip_grad = engine.gradient_clipping()
        self.overflow = False
        self.skips = 0
        self._global_grad_norm: float | None = 0.0
        self.custom_loss_scaler = False
        self.torch_autocast_gradscaler = None
        self.loss_scaler = deepspeed_compat.create_loss_scaler(
            dtype, engine.loss_scale(), engine.dynamic_loss_scale(), engine.dynamic_loss_scale_args()
        )
        self.dynamic_loss_scale = self.loss_scaler.dynamic

    def clear_backward_seen_flag(self) -> None:
        """The engine calls it at the start of every forward."""
        super().clear_backward_seen_flag()
        # Not module.training: models come from ``from_pretrained`` in evaluation mode, in which they can train, too.
        self.in_forward = torch.is_grad_enabled()

    def enter_backward(self) -> None:
        """The engine calls it at the start of every backward, when the gradient reaches the model's output."""
        super().enter_backward()
        self.in_forward = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The client's groups: hyper-parameters only."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.cur_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self.loss_scaler.cur_scale = value

    cur_scale = loss_scale

    def update_loss_scale(self, finite: bool) -> None:
        """Adapt a dynamic loss scale; without one, FloatingPointError after more than 20 steps with overflow."""
        self.loss_scaler.update_scale(not finite)
        self.skips = 0 if finite else self.skips + 1
        if self.skips > MAX_CONSECUTIVE_SKIPS and not self.dynamic_loss_scale:
            raise FloatingPointError(
                f"gradients were not finite for {self.skips} steps in a row; no weight was updated in them. "
                "Lower the learning rate, clip gradients, or look for bad samples."
            )

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """The engine's hook after backward from stage 2 on; ``backward_epilogue``, which follows, does the work."""

    finalize_gradient_accumulation_boundary = overlapping_partition_gradients_reduce_epilogue
    checkpoint_event_prologue = checkpoint_event_epilogue = overlapping_partition_gradients_reduce_epilogue  # ZeRO-3's

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError('engine.offload_states() does not know about layers; use "grass": {"offload": ...}')

    reload_states = offload_states
