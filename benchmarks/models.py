# SPDX-License-Identifier: Apache-2.0
"""Models of the benchmarks: those of ``launch``, and published shapes with random weights."""

import copy
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PretrainedConfig

import launch.model
from grass_ds.precision import DTYPES


def llama(hidden: int, intermediate: int, layers: int, heads: int, vocab: int, **more: Any) -> LlamaConfig:
    """A Llama of these numbers."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocab,
        **more,
    )


# As in the config.json of the published models.
SHAPES: dict[str, PretrainedConfig] = {
    "llama2-7b-random": llama(4096, 11008, 32, 32, 32000),
    "tinyllama-random": llama(2048, 5632, 22, 32, 32000, num_key_value_heads=4),
    "gemma-2b-random": GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256000,
    ),
    "llama-tiny-random": llama(64, 128, 6, 4, 1000),
}
# "random:layers=12,vocab=64000": a Llama of these numbers, and the defaults for what is left out.
RANDOM = "random:"
DEFAULTS = {"layers": 12, "hidden": 256, "intermediate": 768, "heads": 4, "vocab": 32000}


def load(name: str, dtype: str) -> tuple[nn.Module, Any]:
    """Model and tokenizer, weights in ``dtype`` (a name of :data:`DTYPES`).

    A model with random weights is created on the device and has no tokenizer.

    Raises:
        ValueError: a ``random:`` name with an unknown key or a value that is not a positive integer.
    """
    if name not in SHAPES and not name.startswith(RANDOM):
        model, tokenizer = launch.model.load(name, dtype)
        model.config.use_cache = False  # as the Trainer does: or every forward pass copies keys and values
        return model, tokenizer
    config = copy.deepcopy(SHAPES[name]) if name in SHAPES else llama(**random_shape(name))
    config.use_cache = False
    with torch.device(get_accelerator().current_device_name()):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]), None


def random_shape(name: str) -> dict[str, int]:
    """Numbers of a ``random:`` name; those of :data:`DEFAULTS` where it gives none.

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


def largest_layer(model: nn.Module) -> int:
    """Parameters of the largest decoder block."""
    return max(sum(p.numel() for p in layer.parameters()) for layer in model.get_decoder().layers)


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Widths and elements of a Hugging Face decoder, which ZeRO-3 may have partitioned and LoRA wrapped.

    Returns:
        ``hidden``, ``intermediate``, ``layers``, ``heads``, ``kv_heads``, ``head_dim``, ``vocab``, ``tied``; elements
        of a layer, of embeddings, head (0 if tied) and final norm, without LoRA's; LoRA's rank (None without it) and
        elements of all adapters.
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
