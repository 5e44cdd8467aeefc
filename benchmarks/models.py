# SPDX-License-Identifier: Apache-2.0
"""Models of the benchmarks: those of ``launch``, and published shapes with random weights."""

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig

import launch.model
from grass_ds.precision import DTYPES

SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size"),
)
# As in the config.json of the published models, and a tiny one: kind, then SIZES.
SHAPES: dict[str, tuple[Any, ...]] = {
    "llama2-7b-random": (LlamaConfig, 4096, 11008, 32, 32, 32, 128, 32000),
    "tinyllama-random": (LlamaConfig, 2048, 5632, 22, 32, 4, 64, 32000),
    "gemma-2b-random": (GemmaConfig, 2048, 16384, 18, 8, 1, 256, 256000),
    "llama-tiny-random": (LlamaConfig, 64, 128, 6, 4, 4, 16, 1000),
}


def random_model(name: str, dtype: torch.dtype) -> nn.Module:
    """A model of one of :data:`SHAPES`, on torch's current device."""
    kind, *sizes = SHAPES[name]
    config = kind(**dict(zip(SIZES, sizes, strict=True)), use_cache=False)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def load(name: str, dtype: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer, weights in ``dtype`` (a name of :data:`DTYPES`).

    A model with random weights is created on the device and has no tokenizer.
    """
    if name not in SHAPES:
        model, tokenizer = launch.model.load(name, dtype)
        model.config.use_cache = False  # as the Trainer does: or every forward pass copies keys and values
        return model, tokenizer
    with torch.device(get_accelerator().current_device_name()):
        return random_model(name, DTYPES[dtype]), None


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Widths and elements of a Hugging Face decoder, which ZeRO-3 may have partitioned and LoRA wrapped.

    Returns:
        Widths and counts; ``tied``; elements (``_numel``) of a layer, of embeddings, head (0 if tied) and final norm,
        without LoRA's; LoRA's rank (None without it) and elements of all adapters.
    """
    config, decoder = model.config, model.get_decoder()
    adapters = {name: param for name, param in model.named_parameters() if "lora_" in name}
    heads = config.num_attention_heads
    return {
        "hidden": config.hidden_size,
        "intermediate": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocab": config.vocab_size,
        "tied": bool(config.tie_word_embeddings),
        "layer_numel": _numel(decoder.layers[0]),
        "embed_numel": _numel(decoder.embed_tokens),
        "head_numel": 0 if config.tie_word_embeddings else _numel(model.get_output_embeddings()),
        "norm_numel": _numel(decoder.norm),
        "lora_rank": next((_shape(param)[0] for name, param in adapters.items() if "lora_A" in name), None),
        "lora_numel": sum(_shape(param).numel() for param in adapters.values()),
    }


def _numel(module: nn.Module) -> int:
    return sum(_shape(param).numel() for name, param in module.named_parameters() if "lora_" not in name)


def _shape(param: nn.Parameter) -> Any:
    return getattr(param, "ds_shape", param.shape)
