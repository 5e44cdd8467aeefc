# SPDX-License-Identifier: Apache-2.0
"""A model's shape, as far as its cost depends on it."""

from typing import Any

from torch import nn


def shape_of(model: nn.Module) -> dict[str, Any]:
    """Widths and elements of a Hugging Face decoder, also where ZeRO-3 has partitioned or LoRA has wrapped it.

    Returns:
        ``hidden``, ``intermediate``, ``layers``, ``heads``, ``kv_heads``, ``head_dim``, ``vocab``, ``tied``; elements of a layer, of
        embeddings, head (0 if tied) and final norm, without LoRA's; LoRA's rank (None without) and elements of all adapters.
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
