# SPDX-License-Identifier: Apache-2.0
"""Run in LLaMA-Factory's environment: bytes of activations that are kept for backward while one of eight layers trains.

Prints JSON: for each active layer the bytes without checkpointing, with LLaMA-Factory's and with the Trainer's.
"""

import json
from functools import partial
from typing import Any

import torch
from llamafactory.model.model_utils.checkpointing import get_custom_gradient_checkpointing_func
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

TRAINERS = partial(checkpoint, use_reentrant=False)
FUNCTIONS = {"none": None, "llama_factory": get_custom_gradient_checkpointing_func(TRAINERS), "trainer": TRAINERS}


def kept_bytes(function: Any, active: int) -> int:
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_key_value_heads=2, use_cache=False, **shape)).train()
    model.requires_grad_(False)
    model.model.layers[active].requires_grad_(True)
    if function is not None:
        model._set_gradient_checkpointing(True, function)
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors, so that no storage is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(4, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


if __name__ == "__main__":
    found = {name: [kept_bytes(function, active) for active in (0, 7)] for name, function in FUNCTIONS.items()}
    print(json.dumps(found))
