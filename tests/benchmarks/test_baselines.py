# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks compare with: that it is what its name says."""

from typing import Any

import pytest
import torch
from helpers.models import tiny_llama

from benchmarks.baselines import active_layers
from benchmarks.case import Case
from benchmarks.measure.engine import build, random_steps, trainable_numel
from benchmarks.measure.observer import memory
from benchmarks.methods import METHODS, ds_config, prepare_model
from benchmarks.models import load
from grass_ds.config import GrassConfig

LAYERS, PERIOD, STEPS = 6, 3, 9


def train(method: str, accumulation: int) -> tuple[list[Any], set[str]]:
    """On stock ZeRO-2: layers trained per step, and the weights that are not what they were."""
    settings = {"num_active_layers": 2, "sample_period": PERIOD}
    shape = {"micro_batch": 1, "accumulation": accumulation, "sequence": 8}
    case = Case(kind="cost", method=method, **shape, steps=STEPS, lr=1e-2, seed=1, grass=settings)
    torch.manual_seed(0)
    engine, toggle = build(case, load("llama-tiny-random", "bf16")[0])
    one_step = random_steps(case, engine)
    numel = trainable_numel(engine)  # of toggled layers all, before the first step
    before = {name: weight.detach().clone() for name, weight in engine.module.named_parameters()}
    active = []
    for _ in range(STEPS):
        active.append(active_layers(engine, toggle))
        one_step()
    now = dict(engine.module.named_parameters())
    moved = {name for name, weight in before.items() if not torch.equal(now[name], weight)}
    # fp32 weights and two moments of a half of what trains
    assert 12 <= 2 * memory(engine)["optimizer_state"]["device"] / numel < 12.1
    return active, moved


def train_baselines() -> dict[str, Any]:
    return {"lisa-toggle": train("lisa-toggle", 2), "lora-fa": train("lora-fa", 1)}


@pytest.mark.dist
def test_toggling_draws_layers_and_lora_fa_trains_b(two_ranks: Any) -> None:
    here, there = two_ranks.run(train_baselines)
    assert here == there  # the same draws, and the same weights moved
    active, moved = here["lisa-toggle"]
    first, second, third = (set(layers) for layers in active[::PERIOD])
    assert active == [sorted(layers) for layers in (first, second, third) for _ in range(PERIOD)]
    assert len(first) == len(second) == len(third) == 2 and len(first | second) > 2
    assert {int(name.split(".")[2]) for name in moved if ".layers." in name} == first | second | third
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= moved
    active, moved = here["lora-fa"]
    assert active == [None] * STEPS
    assert len(moved) == 7 * LAYERS and all(".lora_B." in name for name in moved)


@pytest.mark.parametrize(("method", "rank"), [("lora-16", 16), ("lora", 128), ("lora-fa", 128)])
def test_adapters(method: str, rank: int) -> None:
    model: Any = prepare_model(method, tiny_llama(hidden=24, layers=1))
    named = dict(model.named_parameters())
    trained = {name for name, weight in named.items() if weight.requires_grad}
    letters = "B" if method == "lora-fa" else "AB"
    assert trained == {name for name in named if any(f".lora_{letter}." in name for letter in letters)}
    assert len(trained) == 7 * len(letters)
    assert {weight.shape[1] for name, weight in named.items() if ".lora_B." in name} == {rank}
    layer = model.get_decoder().layers[0].mlp.up_proj
    assert layer.scaling == {"default": 2.0}  # alpha 2r


@pytest.mark.parametrize("method", METHODS)
def test_configs_differ_where_the_method_does(method: str) -> None:
    config, stock = (ds_config(Case(kind="cost", method=one, grass={"seed": 7})) for one in (method, "full"))
    block = config.pop("grass", None)
    assert (block is None) == (METHODS[method].grass is None)
    if block is not None:
        assert GrassConfig(**block).seed == 7
    offload = config["zero_optimization"].pop("offload_optimizer", None)
    assert config == stock
    assert (offload is not None) == (method == "full-offload")
