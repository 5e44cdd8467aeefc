# SPDX-License-Identifier: Apache-2.0
"""Activation checkpointing beside layers that do not train.

Reentrant checkpointing runs each block as one autograd function that backward enters only if an *input* of it requires a gradient; below
the embeddings of a frozen model nothing does, and the active layers silently stay put. Hugging Face models answer that with a hook that
makes the embeddings' output require a gradient. Non-reentrant checkpointing does not need the hook, and with it backward runs down to the
embeddings instead of stopping at the lowest active layer. So: hook on for reentrant, off for non-reentrant, when embeddings do not train.
"""

from typing import Any

from deepspeed.utils import logger
from torch import nn


def _checkpointing_modes(model: nn.Module) -> set[bool]:
    """``use_reentrant`` of every module that checkpoints (Hugging Face's convention)."""
    modes = set()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            keywords = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            modes.add(bool(keywords.get("use_reentrant", True)))
    return modes


def inputs_require_gradients(model: Any) -> bool:
    """Whether ``enable_input_require_grads`` is in force: transformers 5 keeps a list of its hooks, transformers 4 the last one."""
    last = getattr(model, "_require_grads_hook", None)
    if last is not None:
        return last.id in model.get_input_embeddings()._forward_hooks
    return bool(getattr(model, "_require_grads_hooks", None))


def fit_input_gradients(model: Any, embeddings_train: bool) -> bool:
    """Make the model's embedding output require a gradient exactly when activation checkpointing needs it.

    Does nothing for models that do not follow Hugging Face's convention, or when embeddings train or nothing is checkpointed.

    Returns:
        Whether backward runs down to the embeddings, rather than to the lowest active layer.
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
