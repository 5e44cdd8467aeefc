# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing in a model with layers that do not train.

Backward enters a block with reentrant checkpointing only if an *input* requires a gradient, which none does below
embeddings that do not train. Hugging Face models then set a hook that makes the embeddings' output require a gradient.
With non-reentrant checkpointing the hook is not needed, and backward would run down to the embeddings. So when the
embeddings do not train, the hook is set for reentrant checkpointing and removed for non-reentrant.
"""

from typing import Any

from deepspeed.utils import logger
from torch import nn


def _checkpointing_modes(model: nn.Module) -> set[bool]:
    """``use_reentrant`` of every module that checkpoints (Hugging Face's convention)."""
    modules = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in modules]
    return {bool(getattr(function, "keywords", {}).get("use_reentrant", True)) for function in functions}


def inputs_require_gradients(model: Any) -> bool:
    """Whether ``enable_input_require_grads`` was called; transformers 5 keeps all its hooks, 4 the last."""
    last = getattr(model, "_require_grads_hook", None)
    if last is not None:
        return last.id in model.get_input_embeddings()._forward_hooks
    return bool(getattr(model, "_require_grads_hooks", None))


def fit_input_gradients(model: Any, embeddings_train: bool) -> bool:
    """Make the embeddings' output require a gradient exactly when activation checkpointing needs it.

    Does nothing without checkpointing, if the embeddings train, or outside Hugging Face's convention. Returns whether
    backward runs down to the embeddings rather than to the lowest active layer.
    """
    modes = _checkpointing_modes(model)
    if embeddings_train or not modes or not hasattr(model, "enable_input_require_grads"):
        return embeddings_train or inputs_require_gradients(model)
    hooked = inputs_require_gradients(model)
    if True in modes and not hooked:
        model.enable_input_require_grads()
    elif True not in modes and hooked:
        model.disable_input_require_grads()
        logger.info("non-reentrant activation checkpointing: backward stops at the lowest active layer")
    return True in modes
