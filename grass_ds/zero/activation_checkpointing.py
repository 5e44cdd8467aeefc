# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing in a model with layers that do not train.

Backward enters a block with reentrant checkpointing only if an *input* requires a gradient, which none does below
embeddings that do not train. Hugging Face models then set a hook that makes the embeddings' output require a gradient.
With non-reentrant checkpointing the hook is not needed, and backward would run down to the embeddings. So when the
embeddings do not train, the hook is set for reentrant checkpointing and removed for non-reentrant.
"""

import logging
import warnings
from typing import Any

import torch
from deepspeed.utils import log_dist, logger
from torch import nn

_REENTRANT = (
    "grass_ds: activation checkpointing is reentrant. Every backward then recomputes all layers and runs down to the "
    "embeddings, whichever layers are active. Non-reentrant checkpointing ends at the lowest active layer: set "
    "gradient_checkpointing_kwargs={'use_reentrant': False} (LLaMA-Factory: use_reentrant_gc: false)"
)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.weight


def is_reentrant(checkpoint: Any) -> bool:
    """Whether a layer that is called through ``checkpoint(layer.forward, hidden)`` trains only if ``hidden`` requires
    a gradient.

    It is tried on a layer of one weight. Arguments of the function do not tell: front-ends wrap it, replace it, and
    override its ``use_reentrant``. A function that cannot be tried counts as reentrant.
    """
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")  # torch warns of exactly this
        try:
            return not checkpoint(_Layer().forward, torch.zeros(1)).requires_grad
        except Exception:  # whatever a stranger's function needs and does not find here
            return True


def _checkpointing_modes(model: nn.Module) -> set[bool]:
    """Whether they are reentrant, of all functions by which modules checkpoint (Hugging Face's convention)."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = {id(f): f for f in (getattr(module, "_gradient_checkpointing_func", None) for module in modules)}
    return {is_reentrant(function) for function in functions.values()}


def inputs_require_gradients(model: Any) -> bool:
    """Whether ``enable_input_require_grads`` was called; transformers 5 keeps all its hooks, 4 the last."""
    last = getattr(model, "_require_grads_hook", None)
    if last is not None:
        return last.id in model.get_input_embeddings()._forward_hooks
    return bool(getattr(model, "_require_grads_hooks", None))


def fit_input_gradients(model: Any, embeddings_train: bool) -> bool:
    """Make the embeddings' output require a gradient exactly when activation checkpointing needs it.

    Does nothing without checkpointing, if the embeddings train, or outside Hugging Face's convention. Warns on rank 0
    of reentrant checkpointing. Returns whether backward runs down to the embeddings rather than to the lowest active
    layer.
    """
    modes = _checkpointing_modes(model)
    if embeddings_train or not modes or not hasattr(model, "enable_input_require_grads"):
        return embeddings_train or inputs_require_gradients(model)
    hooked = inputs_require_gradients(model)
    if True in modes and not hooked:
        model.enable_input_require_grads()
    if True in modes:
        log_dist(_REENTRANT, ranks=[0], level=logging.WARNING)
    elif hooked:
        model.disable_input_require_grads()
        logger.info("non-reentrant activation checkpointing: backward stops at the lowest active layer")
    return True in modes
