# SPDX-License-Identifier: Apache-2.0
"""``memory_budget``: the number of layers that fits, and an engine that trains as many."""

import copy
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from helpers.models import tiny_llama
from helpers.ranks import RankPool
from torch import nn

from grass_ds.config import GrassConfig, GrassConfigError, parse_grass_block
from grass_ds.plan.budget import fit_active_layers
from grass_ds.plan.model_shape import ModelShape
from grass_ds.plan.predict import predict
from grass_ds.plan.run_shape import run_shape

LAYERS, ROW = 6, 32
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "grass": {"sampler": "uniform", "sample_period": 2, "row_length": ROW, "offload": {"device": "none"}},
}


def budgeted(budget: str, **changed: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    config["grass"] |= {"memory_budget": budget, **changed}
    return config


def block_of(config: dict[str, Any]) -> GrassConfig:
    found = parse_grass_block(config)
    assert found is not None
    return found


def planned(count: int, ranks: int = 2, **keys: float) -> int:
    """Bytes on the device with so many layers at a time, and these keys of the block."""
    config = copy.deepcopy(CONFIG)
    config["grass"] = {**config["grass"], "num_active_layers": count, **keys}
    del config["grass"]["row_length"]
    shape = ModelShape(tiny_llama(layers=LAYERS).config, torch.bfloat16)
    return predict(shape, run_shape(config, ranks, ROW, False)).total


@pytest.mark.parametrize("count", [1, 3, LAYERS])
def test_the_largest_number_that_fits_is_taken(count: int) -> None:
    """Its plan's bytes are enough, and one byte less is not: the plan with one layer less is taken then."""
    model, size = tiny_llama(layers=LAYERS), planned(count)
    if count > 1:
        assert planned(count - 1) < size
    for missing, expected in ((0, count), (1, count - 1)):
        config = budgeted(f"{(size - missing) / 1000:.3f}KB")
        if expected == 0:
            with pytest.raises(
                GrassConfigError, match=r"memory_budget = .*: one layer at a time, 2 rows of 32 tokens"
            ):
                fit_active_layers(model, block_of(config), config, 2)
        else:
            found, plan = fit_active_layers(model, block_of(config), config, 2)
            assert (found.num_active_layers, plan.total) == (expected, planned(expected))


def test_sign_steps_are_counted() -> None:
    """Layers that take them keep as much for backward as layers that train: here either none fits, or all do."""
    model, size = tiny_llama(layers=LAYERS), planned(1, expansion=0.2)
    assert planned(LAYERS - 1) < size == planned(LAYERS)
    config = budgeted(f"{size / 1000:.3f}KB")
    config["grass"]["expansion"] = 0.2
    assert fit_active_layers(model, block_of(config), config, 2)[0].num_active_layers == LAYERS
    config["grass"]["memory_budget"] = f"{(size - 1) / 1000:.3f}KB"
    with pytest.raises(GrassConfigError, match="one layer at a time"):
        fit_active_layers(model, block_of(config), config, 2)


def test_a_batch_is_what_deepspeed_makes_of_it() -> None:
    config = budgeted("1GB")
    del config["train_micro_batch_size_per_gpu"]
    for given, expected in (
        ({"train_batch_size": 8}, (4, 1)),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, (2, 2)),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 1}, (1, 4)),
        ({"train_micro_batch_size_per_gpu": 3}, (3, 1)),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}, (2, 2)),
    ):
        run = run_shape({**config, **given}, 2, ROW, False)
        assert (run.micro_batch, run.accumulation) == expected


def test_checkpointing_leaves_room_for_more() -> None:
    model, config = tiny_llama(layers=LAYERS), budgeted(f"{planned(2) / 1000:.3f}KB")
    plain, _ = fit_active_layers(model, block_of(config), config, 2)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, plan = fit_active_layers(model, block_of(config), config, 2)
    assert plain.num_active_layers == 2
    assert plan.saved < predict(ModelShape(model.config, torch.bfloat16), run_shape(config, 2, ROW, False)).saved


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"num_active_layers": "auto"}, 'num_active_layers = "auto" needs memory_budget and row_length'),
        ({"memory_budget": "1GB"}, 'memory_budget = "1GB" needs row_length'),
        ({"row_length": 4}, "row_length = 4 has no effect without memory_budget"),
        ({"memory_budget": "1", "row_length": 4}, "expected a size above 0 with its unit, as in 24GB"),
        ({"memory_budget": "1GB", "row_length": 4, "num_active_layers": 2}, "leave one of them out"),
        ({"memory_budget": "1GB", "row_length": 4, "sampler": "module"}, 'no effect with sampler "module"'),
    ],
)
def test_what_contradicts_itself_is_refused(block: dict[str, Any], said: str) -> None:
    with pytest.raises(GrassConfigError, match=r"the .grass. block") as caught:
        parse_grass_block({"grass": block})
    assert said in str(caught.value)


def test_a_model_without_a_config_is_refused() -> None:
    config = budgeted("1GB")
    with pytest.raises(GrassConfigError, match=r"memory_budget: Linear has no Hugging Face config.*num_active_layers"):
        fit_active_layers(nn.Linear(2, 2), block_of(config), config, 2)


def test_zero_3_earlier_in_the_process_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed leaves its linear layers in the process: those of frozen layers then keep their input at any stage."""
    inputs_kept = ModelShape(tiny_llama(layers=LAYERS).config, torch.bfloat16).activations((), 2, ROW, False, True)
    before = planned(1)
    monkeypatch.setattr(nn.functional, "linear", zero3_linear_wrap)
    shape = ModelShape(tiny_llama(layers=LAYERS).config, torch.bfloat16)
    assert shape.activations((), 2, ROW, False, False) == inputs_kept
    assert planned(1) > before


def engine_layers() -> tuple[int, int]:
    """Run inside a rank: layers at a time, and those that the third step trained."""
    from helpers.models import engine_of, train

    # In the rank, where an earlier test may have run ZeRO-3.
    config = budgeted(f"{planned(3) / 1000:.3f}KB", num_active_layers="auto")
    with engine_of(config, tiny_llama(layers=LAYERS).bfloat16()) as engine:
        train(engine, 3)
        return engine.grass.most_active, len(engine.grass.active_layers)


@pytest.mark.dist
def test_an_engine_trains_as_many_on_every_rank(two_ranks: RankPool) -> None:
    assert two_ranks.run(engine_layers) == [(3, 3)] * 2
