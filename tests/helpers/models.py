# SPDX-License-Identifier: Apache-2.0
"""Tiny models, DeepSpeed configs and the training loop that the distributed tests share. Run inside a rank."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

VOCAB, SEQUENCE, LAYERS = 128, 16, 4
# ZeRO-3 gathers weights for each use and releases them after it, as those of a large model; by default it keeps such small ones.
RELEASED = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}


def tiny_llama(
    layers: int = LAYERS, tied: bool = False, seed: int = 0, hidden: int = 32, bias: bool = False
) -> nn.Module:
    """A random Llama. Its units do not divide evenly into shards; with ``bias`` its parameters do not, either."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden + 5,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        mlp_bias=bias,
        attention_dropout=0.0,
    )
    return LlamaForCausalLM(config)


def ds_config(
    stage: int = 2, dtype: str = "fp32", clip: float = 0.0, gas: int = 1, lr: float = 1e-3, **extra: Any
) -> dict[str, Any]:
    """A DeepSpeed config with torch's AdamW (no JIT build); ``extra`` is merged into the top level."""
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": lr, "weight_decay": 0.1, "torch_adam": True}},
        "steps_per_print": 10**9,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    for key, value in extra.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), dict):
            config[key].update(value)
        else:
            config[key] = value
    return config


def without_optimizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config for an optimizer that the caller brings."""
    return {key: value for key, value in config.items() if key != "optimizer"} | {
        "zero_allow_untested_optimizer": True
    }


def grass_block(**settings: Any) -> dict[str, Any]:
    """A fast-moving sampler: probe 2 steps, switch every 3."""
    return {"num_active_layers": 1, "probe_steps": 2, "sample_period": 3, "refresh_period": 6, "seed": 7, **settings}


def cyclic(period: int = 1, **settings: Any) -> dict[str, Any]:
    """Layer (step // period) % LAYERS is active, and otherwise only the final norm."""
    return grass_block(sampler="cyclic", cyclic_order="ascending", sample_period=period, **settings)


def layer_of(name: str) -> int | None:
    """Index of the decoder block that a parameter is in."""
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else None


def batch(step: int, micro: int, rank: int, size: int = 2) -> torch.Tensor:
    """Token ids [size, SEQUENCE], a function of step, micro-step and rank alone."""
    generator = torch.Generator().manual_seed(10_000 * step + 100 * micro + rank)
    return torch.randint(0, VOCAB, (size, SEQUENCE), generator=generator)


def loss_of(engine: Any, step: int, micro: int = 0) -> torch.Tensor:
    """The loss of this rank's batch."""
    ids = batch(step, micro, engine.global_rank).to(engine.device)
    return engine(input_ids=ids, labels=ids).loss


def backward(engine: Any, step: int, micro: int = 0) -> None:
    engine.backward(loss_of(engine, step, micro))


def train(engine: Any, steps: int, start: int = 0, after_step: Callable[[int], None] | None = None) -> list[float]:
    """``steps`` optimizer steps; the loss of each one's last micro-batch on this rank."""
    losses = []
    for step in range(start, start + steps):
        for micro in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, step, micro)
            engine.backward(loss)
            engine.step()
        losses.append(loss.item())
        if after_step is not None:
            after_step(step)
    return losses


@contextmanager
def gathered(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters whole inside, also those that ZeRO-3 has partitioned. Collective then."""
    import deepspeed

    partitioned = [param for param in params if hasattr(param, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext():
        yield


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters by name. Gathered one at a time: see ``deepspeed_compat.waits_for_all_gathers``."""
    copies = {}
    for name, param in module.named_parameters():
        with gathered([param]):
            copies[name] = param.detach().clone()
    return copies


def unit_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Param groups for a stock baseline: one per unit of grass_ds, in its order (the norm is summed over groups)."""
    members: dict[str, list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        parts = name.split(".")
        members.setdefault(parts[2] if "layers" in parts else name, []).append(param)
    blocks = sorted((key for key in members if key.isdigit()), key=int, reverse=True)
    head = [key for key in ("lm_head.weight",) if key in members]
    return [{"params": members[key]} for key in (*head, "model.norm.weight", *blocks, "model.embed_tokens.weight")]


def split_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Decay and no decay: two units per layer."""
    norms = {id(p) for name, p in model.named_parameters() if "norm" in name}
    return [
        {"params": [p for p in model.parameters() if id(p) not in norms], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if id(p) in norms], "weight_decay": 0.0},
    ]


@contextmanager
def engine_of(config: dict[str, Any], model: nn.Module | None = None, **arguments: Any) -> Any:
    """An engine for the length of a ``with`` block; grass if the config has the block, stock otherwise."""
    import grass_ds

    model = tiny_llama() if model is None else model
    if "optimizer" not in arguments and "model_parameters" not in arguments:
        arguments["model_parameters"] = list(model.parameters())
    engine, *_ = grass_ds.initialize(model=model, config=config, **arguments)
    try:
        yield engine
    finally:
        engine.destroy()
