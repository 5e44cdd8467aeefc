# SPDX-License-Identifier: Apache-2.0
"""Models of the benchmarks: those of ``launch``, and shapes with random weights where nothing can be downloaded."""

import copy
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PretrainedConfig

import launch.model
from grass_ds.precision import DTYPES

# Shapes of published models: what their config.json says.
SHAPES: dict[str, PretrainedConfig] = {
    "llama2-7b-random": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        vocab_size=32000,
    ),
    "tinyllama-random": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
    ),
    "gemma-2b-random": GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256000,
    ),
    "llama-tiny-random": LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        vocab_size=1000,
    ),
}
# "random:layers=12,vocab=64000": a Llama of these numbers, and what is left out as here.
RANDOM = "random:"
DEFAULTS = {"layers": 12, "hidden": 256, "intermediate": 768, "heads": 4, "vocab": 32000}


def load(name: str, dtype: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer, weights in ``dtype`` (a name of :data:`DTYPES`); a model with random weights is made on the device and has no tokenizer.

    Raises:
        ValueError: a ``random:`` name with an unknown key or a value that is not a positive integer.
    """
    if name not in SHAPES and not name.startswith(RANDOM):
        model, tokenizer = launch.model.load(name, dtype)
        model.config.use_cache = False  # as Hugging Face Trainer does: or every forward pass copies keys and values
        return model, tokenizer
    config = copy.deepcopy(SHAPES[name]) if name in SHAPES else _llama(random_shape(name))
    config.use_cache = False
    with torch.device(get_accelerator().current_device_name()):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]), None


def random_shape(name: str) -> dict[str, int]:
    """Numbers of a ``random:`` name, those of :data:`DEFAULTS` where it says nothing.

    Raises:
        ValueError: an unknown key or a value that is not a positive integer.
    """
    shape = dict(DEFAULTS)
    for part in filter(None, name.removeprefix(RANDOM).split(",")):
        key, _, value = part.partition("=")
        if key not in DEFAULTS or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"model {name!r}: {part!r} is not KEY=N with N >= 1 and KEY one of {', '.join(DEFAULTS)}")
        shape[key] = int(value)
    return shape


def _llama(shape: dict[str, int]) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        vocab_size=shape["vocab"],
    )


def largest_layer(model: nn.Module) -> int:
    """Parameters of the largest decoder block."""
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers)
