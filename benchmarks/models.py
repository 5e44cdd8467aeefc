# SPDX-License-Identifier: Apache-2.0
"""Models of the benchmarks: those of ``launch``, and Llama shapes with random weights where nothing can be downloaded."""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import launch.model

SHAPES = {
    "llama2-7b-random": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-tiny-random": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    },
}


def load(name: str) -> tuple[nn.Module, Any]:
    """Model in bf16 and tokenizer; a model of :data:`SHAPES` is made on the device and has no tokenizer."""
    if name not in SHAPES:
        return launch.model.load(name)
    config = LlamaConfig(**SHAPES[name], tie_word_embeddings=False, use_cache=False)
    with torch.device(get_accelerator().current_device_name()):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), None


def largest_layer(model: nn.Module) -> int:
    """Parameters of the largest decoder block."""
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers)
