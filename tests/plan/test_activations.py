# SPDX-License-Identifier: Apache-2.0
"""What is measured on the meta device, against tensors that are there, and against formulas written by hand."""

import copy
import gc
from typing import Any

import pytest
import torch
from helpers.live import LiveBytes
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from grass_ds.plan.model_shape import ModelShape, read_config
from grass_ds.zero.activation_checkpointing import fit_input_gradients

ROWS, TOKENS, HIDDEN, INTER, VOCAB, HEADS, KEYS = 2, 64, 96, 256, 512, 6, 2


def llama(layers: int = 4, tied: bool = False) -> LlamaConfig:
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KEYS, "max_position_embeddings": TOKENS}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTER, "num_hidden_layers": layers, "vocab_size": VOCAB}
    return LlamaConfig(**heads, **sizes, tie_word_embeddings=tied, use_cache=False)


def forward_bytes(config: Any, active: set[int], outside: set[str], checkpointing: bool) -> int:
    """What forward of a model with memory leaves alive, weights aside."""
    model = LlamaForCausalLM(config).bfloat16().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        fit_input_gradients(model, embeddings_train=False)  # as the engine does
    for name, param in model.named_parameters():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        param.requires_grad_(layer in active if layer is not None else name in outside)
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS))
    gc.collect()
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        before = live.now
        loss = model(input_ids=ids, labels=ids).loss
        after = live.now
    assert loss.requires_grad
    return after - before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("active", [{0}, {3}, {1, 2}, {0, 3}])
def test_blocks_add_up_to_what_forward_leaves(active: set[int], tied: bool, checkpointing: bool) -> None:
    """The linear layers of ZeRO-1 and 2."""
    found = ModelShape(llama(tied=tied), torch.bfloat16).activations(("norm",), ROWS, TOKENS, checkpointing, False)
    lowest = min(active)
    costs = [(found.trained if layer in active else found.frozen)[layer].saved for layer in range(lowest + 1, 4)]
    expected = found.lowest[lowest].saved + sum(costs) + found.outside
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        measured = forward_bytes(llama(tied=tied), active, {"model.norm.weight"}, checkpointing)
    # The positions, a few numbers of the loss, and the embedding's ids.
    assert measured == pytest.approx(expected, abs=3 * 8 * ROWS * TOKENS)


def test_eager_attention_keeps_its_scores() -> None:
    config = llama()
    config._attn_implementation = "eager"
    found = ModelShape(config, torch.bfloat16, "eager").activations(("norm",), ROWS, TOKENS, False, False)
    expected = found.lowest[1].saved + found.trained[2].saved + found.frozen[3].saved + found.outside
    measured = forward_bytes(config, {1, 2}, {"model.norm.weight"}, False)
    assert measured == pytest.approx(expected, rel=1e-3)
    fused = ModelShape(config, torch.bfloat16).activations(("norm",), ROWS, TOKENS, False, False)
    assert found.frozen[3].saved - fused.frozen[3].saved >= 2 * ROWS * HEADS * TOKENS**2


def test_the_config_of_the_model_that_trains_stays_as_it_is() -> None:
    config = llama()
    config._attn_implementation = "eager"
    before = copy.deepcopy(config)
    ModelShape(config, torch.bfloat16)
    assert config.to_dict() == before.to_dict() and config._attn_implementation == "eager"


def test_nothing_is_partitioned_under_a_trainer_with_zero3() -> None:
    """It tells transformers to make models by ``deepspeed.zero.Init``, which wants a process group."""
    kept = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    assert is_deepspeed_zero3_enabled()
    model = ModelShape(llama(), torch.bfloat16).model
    del kept
    assert sum(param.numel() for param in model.parameters()) == LlamaForCausalLM(llama()).num_parameters()


def test_a_block_keeps_what_the_formulas_say() -> None:
    """Per token, in bf16: the cost model of the benchmarks, written out by hand."""
    found = ModelShape(llama(), torch.bfloat16).activations((), ROWS, TOKENS, False, False)
    query, key, tokens = HIDDEN, HIDDEN // HEADS * KEYS, ROWS * TOKENS
    inner = 2 * (2 * query + 2 * key) + 4 * HEADS + 2 * 3 * INTER
    norms = 2 * 4 * (HIDDEN + 1)
    inputs = 2 * (2 * HIDDEN + 2 * HIDDEN + INTER)
    assert found.frozen[2].saved == tokens * (inner + norms)
    assert found.trained[2].saved == tokens * (inner + norms + inputs)
    assert found.lowest[2].saved == tokens * (inner + norms + inputs - 4 * (HIDDEN + 1))
    # Logits: fp32, once as they are and once as log-probabilities, and in backward a gradient of either.
    assert found.loss == pytest.approx(3 * 4 * tokens * VOCAB, rel=0.1)


def test_zero3_keeps_inputs_of_frozen_products() -> None:
    model = ModelShape(llama(), torch.bfloat16)
    plain, kept = (model.activations((), ROWS, TOKENS, False, keeps) for keeps in (False, True))
    # Of q, k and v one, of gate and up one, and that of down; that of o is the output of attention.
    assert kept.frozen[1].saved - plain.frozen[1].saved == ROWS * TOKENS * 2 * (2 * HIDDEN + INTER)
    assert kept.trained == plain.trained


def test_recomputed_blocks_keep_their_input_alone() -> None:
    model = ModelShape(llama(), torch.bfloat16)
    kept, again = (model.activations((), ROWS, TOKENS, recomputes, False) for recomputes in (False, True))
    assert {cost.saved for cost in (*again.trained, *again.frozen, *again.lowest)} == {2 * ROWS * TOKENS * HIDDEN}
    assert again.trained[1].backward >= kept.trained[1].backward


def test_blocks_that_differ_are_measured_each() -> None:
    class Wide(ModelShape):
        """One block has a wider MLP."""

        def _build(self) -> Any:
            model = super()._build()
            mlp = model.model.layers[2].mlp
            with torch.device("meta"):
                for name, shape in {
                    "gate_proj": (HIDDEN, 512),
                    "up_proj": (HIDDEN, 512),
                    "down_proj": (512, HIDDEN),
                }.items():
                    setattr(mlp, name, nn.Linear(*shape, bias=False, dtype=torch.bfloat16))
            return model

    found = Wide(llama(), torch.bfloat16).activations((), ROWS, TOKENS, False, False)
    saved = [cost.saved for cost in found.trained]
    assert saved[0] == saved[1] == saved[3]
    assert saved[2] - saved[1] == 2 * ROWS * TOKENS * 4 * (512 - INTER)


@pytest.mark.parametrize("kind", [Gemma3TextConfig, Qwen3Config])
def test_other_models_can_be_planned(kind: Any) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB}
    config = kind(hidden_size=64, intermediate_size=128, num_hidden_layers=6, **heads)
    found = ModelShape(config, torch.bfloat16).activations(("norm",), ROWS, TOKENS, False, False)
    assert len(found.trained) == 6
    assert all(trained.saved > frozen.saved > 0 for trained, frozen in zip(found.trained, found.frozen, strict=True))


def test_a_model_that_depends_on_values_is_refused() -> None:
    class Branching(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            return output if output.logits.sum().item() > 0 else None

    class Shape(ModelShape):
        def _build(self) -> Any:
            with torch.device("meta"):
                return Branching(self.config).bfloat16().train()

    with pytest.raises(ValueError, match="depends on values"):
        Shape(llama(), torch.bfloat16).activations(("norm",), ROWS, TOKENS, False, False)


@pytest.mark.parametrize(("name", "content"), [("missing.json", None), ("bad.json", "{"), ("none.json", "{}")])
def test_a_config_that_is_none_is_named(tmp_path: Any, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name) as caught:
        read_config(str(tmp_path / name))
    assert "llama-2-7b" in str(caught.value)
