# SPDX-License-Identifier: Apache-2.0
"""Models that are no language models: what lies above their blocks trains by default, by exactly the right step."""

from typing import Any

import pytest
import torch
from helpers.models import RELEASED, VOCAB, batch, ds_config, engine_of, grass_block, snapshot
from helpers.observed import difference, logged
from helpers.tiered import tiered
from torch import nn

pytestmark = pytest.mark.dist
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def classifier(kind: str) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    if kind == "reward":
        return hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES, num_labels=1, pad_token_id=0))
    return hf.BertForSequenceClassification(
        hf.BertConfig(**SIZES, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def classified(kind: str, config: dict[str, Any], train_only: tuple[str, ...] = ()) -> dict[str, Any]:
    """Three steps; ``train_only``: prefixes of the parameters that require a gradient, for a stock run."""
    model = classifier(kind)
    if train_only:
        for name, param in model.named_parameters():
            param.requires_grad_(name.startswith(train_only))
    trained = [param for param in model.parameters() if param.requires_grad]
    with engine_of(config, model=model, model_parameters=trained) as engine:
        before = snapshot(engine.module)
        for step in range(3):
            ids = batch(step, 0, engine.global_rank)
            labels = (ids[:, 0] % 2).float()[:, None] if kind == "reward" else ids[:, 0] % 2
            logits = engine(input_ids=ids).logits
            loss = (
                nn.functional.mse_loss(logits, labels)
                if kind == "reward"
                else nn.functional.cross_entropy(logits, labels)
            )
            engine.backward(loss)
            engine.step()
        after = snapshot(engine.module)
        active = [] if engine.grass is None else [engine.grass.layers[i] + "." for i in engine.grass.active_layers]
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        return {"weights": after, "moved": moved, "active": tuple(active)}


ABOVE = {"reward": ("model.norm", "score"), "bert": ("bert.pooler", "classifier")}


@pytest.mark.parametrize(
    ("kind", "stage"), tiered([(k, s) for k in ABOVE for s in (1, 2, 3)], ("reward", 3), ("bert", 2))
)
def test_the_head_of_a_classifier_trains_by_default_as_stock_would(two_ranks: Any, kind: str, stage: int) -> None:
    settings = ds_config(stage=stage, zero_optimization=RELEASED if stage == 3 else {})
    block = grass_block(sampler="uniform", sample_period=100)
    ours = two_ranks.run(classified, kind=kind, config={**settings, "grass": block})
    train_only = (*ABOVE[kind], *ours[0]["active"])
    stock = two_ranks.run(classified, kind=kind, config=settings, train_only=train_only)
    for found, expected in zip(ours, stock, strict=True):
        assert found["moved"] == expected["moved"]
        assert any("score" in name or "classifier" in name for name in found["moved"])
        assert difference(found["weights"], expected["weights"]) is None


def said_at_start() -> dict[str, Any]:
    """What an engine for an encoder-decoder model announces. The encoder is among "other", which may be named."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4
    )
    with (
        logged("grass_ds: ") as lines,
        engine_of(
            ds_config(grass=grass_block(sampler="uniform")), model=hf.T5ForConditionalGeneration(config)
        ) as engine,
    ):
        sizes = {name: param.numel() for name, param in engine.module.named_parameters()}
    block = grass_block(sampler="uniform", always_active=["norm", "other"])
    with engine_of(ds_config(grass=block), model=hf.T5ForConditionalGeneration(config)):
        pass
    share = sum(n for name, n in sizes.items() if name.startswith("encoder.")) / sum(sizes.values())
    return {"said": "".join(lines), "share": f"{share:.2%}"}


def test_the_encoder_of_an_encoder_decoder_model_is_announced_as_never_trained(two_ranks: Any) -> None:
    first, _ = two_ranks.run(said_at_start)
    assert "2 layers at decoder.block" in first["said"]
    assert f"tower ({first['share']} of the weights)" in first["said"].split("never trained: ")[1]


def test_a_kind_that_is_not_there_is_refused_on_every_rank_with_what_there_is(two_ranks: Any) -> None:
    for found in two_ranks.run(said_without_head):
        assert "'head', but this model has nothing of that kind" in found and "'norm' (norm.weight)" in found


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.norm = nn.RMSNorm(16)


def said_without_head() -> str:
    try:
        with engine_of(ds_config(grass=grass_block(always_active=["head"])), model=Headless()):
            return ""
    except ValueError as error:
        return str(error)
