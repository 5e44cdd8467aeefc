# SPDX-License-Identifier: Apache-2.0
"""The loss with the adapters of some layers weakened, for the sampler ``ist`` (IST, arXiv 2410.11772).

Response suppression: the output of the adapters in a set of layers counts a quarter, and the loss tells how much they
matter. The released code draws a batch of its own from the training data for it. Here it is the last micro-batch of
every rank, and the mean loss of all ranks whose micro-batch has tokens to learn.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger
from torch import nn

from grass_ds.config import GrassConfigError
from grass_ds.sampling.controller import Controller

WEAKENED = 0.25  # as released; a power of two, so that taking it back is exact


def adapters_of(model: nn.Module, layers: Sequence[str]) -> list[list[Any]]:
    """Per layer its modules with LoRA adapters (PEFT's ``LoraLayer``).

    Args:
        layers: names of the decoder blocks in ``model``.

    Raises:
        GrassConfigError: a layer has none.
    """
    found = []
    for layer in layers:
        block = model.get_submodule(layer)
        # Adapters of other kinds have a scale_layer() that only warns.
        modules = [m for m in block.modules() if hasattr(m, "scale_layer") and hasattr(m, "lora_A")]
        if not modules:
            raise GrassConfigError(
                f'grass.sampler = "ist" weakens LoRA adapters, and {layer} has none: wrap the model by '
                "peft.get_peft_model with a LoraConfig whose target_modules are in every decoder block; launch/train.py "
                "does so with --method ist"
            )
        found.append(modules)
    return found


def check_trainable(model: nn.Module, layers: Sequence[str]) -> None:
    """Raise GrassConfigError unless adapters train in every layer, and nothing else. Before there is an engine."""
    for layer in layers:
        block = model.get_submodule(layer)
        trained = [name for name, param in block.named_parameters() if param.requires_grad]
        if not any("lora_" in name for name in trained):
            raise GrassConfigError(
                f'grass.sampler = "ist": the adapters of {layer} are frozen; load them by '
                "PeftModel.from_pretrained(..., is_trainable=True)"
            )
        if own := [name for name in trained if "lora_" not in name]:
            raise GrassConfigError(
                f'grass.sampler = "ist" trains adapters alone, but {layer}.{own[0]} requires a gradient: freeze it '
                "(requires_grad = False)"
            )


class ResponseSuppression:
    """Measures the trials of the controller.

    Args:
        model: what the engine trains; it computes its loss itself.
        layers: names of its decoder blocks.
        group: the data-parallel ranks.
        device: for the exchange of losses.

    Raises:
        GrassConfigError: as :func:`adapters_of`.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], group: Any, device: torch.device):
        self._model, self._group, self._device = model, group, device
        self._adapters = adapters_of(model, layers)
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._keep, with_kwargs=True),
            model.register_forward_hook(self._check),
        ]

    def _keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled():
            # By it the Trainer tells how many tokens the step has; the loss of a trial is a mean over its micro-batch.
            self._batch = args, {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}

    def _check(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled() and _loss_of(output) is None:
            raise ValueError(
                'the model returned no loss, by which grass.sampler = "ist" learns: pass the labels to the model, as in '
                "engine(input_ids=ids, labels=labels); in a Trainer leave out label_smoothing_factor and "
                "compute_loss_func, which take them away"
            )

    def update(self, controller: Controller) -> None:
        """Let the controller learn, if it has trials. Call it after a step that was applied, on every rank."""
        trials = controller.trials()
        if not trials:
            return
        losses = self._losses(trials)
        if losses is not None:
            controller.learn(trials, losses)
        elif dist.get_rank() == 0:
            logger.warning(
                "grass_ds: the loss of every rank's last micro-batch is not a number: none has a token to learn, or "
                "training has diverged; the scores stay as they are"
            )

    @torch.no_grad()
    def _losses(self, trials: Sequence[Sequence[int]]) -> list[float] | None:
        """One forward pass in evaluation mode per trial; one all-reduce of one float64 more than trials.

        None: the loss is not a number on any rank, which is what a mean over no token gives.
        """
        if self._batch is None:
            raise ValueError(
                'grass.sampler = "ist" saw no forward pass with gradients: call the engine itself, not a part of its model'
            )
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            mine = [self._loss(layers, *self._batch) for layers in trials]
        finally:
            for module in training:
                module.training = True
        counts = not any(map(math.isnan, mine))
        sums = torch.tensor([*mine, 1.0] if counts else [0.0] * (len(mine) + 1), dtype=torch.float64)
        sums = sums.to(self._device)
        dist.all_reduce(sums, group=self._group)
        *losses, ranks = sums.tolist()
        return [loss / ranks for loss in losses] if ranks else None

    def _loss(self, layers: Sequence[int], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        weakened = [module for layer in layers for module in self._adapters[layer]]
        for module in weakened:
            module.scale_layer(WEAKENED)
        try:
            return float(_loss_of(self._model(*args, **kwargs)))
        finally:
            for module in weakened:
                module.unscale_layer(WEAKENED)

    def remove(self) -> None:
        """Remove the hooks, and release the batch."""
        for hook in self._hooks:
            hook.remove()
        self._batch = None


def _loss_of(output: Any) -> Any:
    """The loss in what a model returned: its attribute, its item, its first, or the output itself; None: none."""
    if isinstance(output, tuple) and output and not hasattr(output, "loss"):
        output = output[0]
    if isinstance(output, torch.Tensor):
        return output if output.numel() == 1 else None
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
