# SPDX-License-Identifier: Apache-2.0
"""The loss with the adapters of some layers weakened, for the sampler ``ist`` (IST, arXiv 2410.11772).

Response suppression: the output of the adapters in a set of layers counts a quarter, and the loss tells how much they
matter. The released code draws a batch of its own from the training data for it. Here it is the last micro-batch of
every rank, and the mean loss of all ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from torch import nn

from grass_ds.config import GrassConfigError
from grass_ds.sampling.controller import Controller

WEAKENED = 0.25  # as released; a power of two, so that taking it back is exact


def adapters_of(model: nn.Module, layers: Sequence[str]) -> list[list[Any]]:
    """Per layer its modules with LoRA adapters (``scale_layer`` of PEFT's ``LoraLayer``).

    Args:
        layers: names of the decoder blocks in ``model``.

    Raises:
        GrassConfigError: a layer has none.
    """
    found = []
    for layer in layers:
        modules = [module for module in model.get_submodule(layer).modules() if hasattr(module, "scale_layer")]
        if not modules:
            raise GrassConfigError(
                f'grass.sampler = "ist" weakens LoRA adapters, and {layer} has none: wrap the model by '
                "peft.get_peft_model with a LoraConfig whose target_modules are in every decoder block"
            )
        found.append(modules)
    return found


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
        self._batch: tuple[tuple[Any, ...], dict[str, Any]] = (), {}
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
                "engine(input_ids=ids, labels=labels)"
            )

    def update(self, controller: Controller) -> None:
        """Let the controller learn, if it has trials. Call it after a step that was applied, on every rank."""
        trials = controller.trials()
        if trials:
            controller.learn(trials, self._losses(trials))

    @torch.no_grad()
    def _losses(self, trials: Sequence[Sequence[int]]) -> list[float]:
        """One forward pass in evaluation mode per trial; one all-reduce of as many float64."""
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        try:
            losses = torch.tensor([self._loss(layers) for layers in trials], dtype=torch.float64, device=self._device)
        finally:
            for module in training:
                module.training = True
        dist.all_reduce(losses, group=self._group)
        return [float(loss) / dist.get_world_size(group=self._group) for loss in losses]

    def _loss(self, layers: Sequence[int]) -> float:
        weakened = [module for layer in layers for module in self._adapters[layer]]
        for module in weakened:
            module.scale_layer(WEAKENED)
        try:
            args, kwargs = self._batch
            return float(_loss_of(self._model(*args, **kwargs)))
        finally:
            for module in weakened:
                module.unscale_layer(WEAKENED)

    def remove(self) -> None:
        """Remove the hooks, and release the batch."""
        for hook in self._hooks:
            hook.remove()
        self._batch = (), {}


def _loss_of(output: Any) -> Any:
    """The loss in what a model returned: its attribute, its item, or the output itself; None: there is none."""
    if isinstance(output, torch.Tensor):
        return output if output.numel() == 1 else None
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
