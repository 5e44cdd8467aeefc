# SPDX-License-Identifier: Apache-2.0
"""Weights assigned by ``param.data = ...`` or moved by ``model.cpu()``: training continues as stock, or refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import RELEASED, backward, ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.observed import difference
from helpers.tiered import tiered
from torch import nn

pytestmark = pytest.mark.dist
UNIFORM = grass_block(sampler="uniform", sample_period=1)


def average_swap(model: nn.Module) -> None:
    """What an EMA callback does: the averages in for an evaluation, and the weights back."""
    weights = {name: param.data for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        param.data = 0.5 * weights[name]
    for name, param in model.named_parameters():
        param.data = weights[name].clone()


def there_and_back(model: nn.Module) -> None:
    """What ``model.cpu()`` and ``model.cuda()`` do to every parameter, where there is one kind of memory."""
    model._apply(lambda tensor: tensor.clone())


def average_swap_after(engine: Any, step: int) -> None:
    if step == 2:
        average_swap(engine.module)


def move_after(engine: Any, step: int) -> None:
    if step == 2:
        there_and_back(engine.module)


def assign_before(engine: Any, step: int) -> None:
    """Other weights, also while probing and in layers that do not train. The step takes the run's own again."""
    for param in engine.module.parameters():
        param.data = 0.5 * param.data


def disturbed(config: dict[str, Any], before: Any = None, after: Any = None) -> dict[str, Any]:
    """Train (steps 0 and 1 probe unless the sampler is full), with a disturbance before or after each step."""
    with engine_of(config) as engine:
        for step in range(6):
            backward(engine, step)
            if before is not None:
                before(engine, step)
            engine.step()
            if after is not None:
                after(engine, step)
        return {"weights": snapshot(engine.module), "scores": engine.grass.scores}


PROBING = grass_block(sample_period=1)
CONFIGS = {
    "zero1": ds_config(stage=1, grass=PROBING),
    "zero1-full": ds_config(stage=1, grass={"sampler": "full"}),
    "zero2": ds_config(grass=PROBING),
    "zero2-bf16": ds_config(dtype="bf16", grass=PROBING),
    "zero3": ds_config(stage=3, grass=PROBING, zero_optimization=RELEASED),
    "zero3-kept": ds_config(stage=3, grass=PROBING),  # small weights stay gathered
}


@pytest.mark.parametrize("name", tiered(CONFIGS, "zero1-full", "zero2", "zero3-kept"))
def test_training_goes_on_as_if_nothing_had_happened(two_ranks: Any, name: str) -> None:
    untouched = two_ranks.run(disturbed, config=CONFIGS[name])
    for how in ({"after": average_swap_after}, {"after": move_after}, {"before": assign_before}):
        found = two_ranks.run(disturbed, config=CONFIGS[name], **how)
        assert difference(found, untouched) is None, how


def refused_on_zero3() -> str:
    with engine_of(ds_config(stage=3, grass=UNIFORM)) as engine:
        train(engine, 1)
        there_and_back(engine.module)
        engine.optimizer.refresh_fp32_params()  # the same values elsewhere
        for param in engine.module.parameters():
            param.data = 0.5 * param.data
        try:
            engine.optimizer.refresh_fp32_params()
        except ValueError as error:
            return str(error)
        return ""


def test_zero3_says_that_it_cannot_take_them_over(two_ranks: Any) -> None:
    for message in two_ranks.run(refused_on_zero3):
        assert "GatheredParameters" in message


def saved_and_resumed(folder: Path) -> dict[str, Any]:
    """Replace the weights by equal ones and by others; save, and load while they are replaced."""
    found: dict[str, Any] = {}
    with engine_of(ds_config(grass=UNIFORM)) as engine:
        train(engine, 2)
        there_and_back(engine.module)
        engine.save_checkpoint(folder, tag="equal")
        saved = snapshot(engine.module)
        for param in engine.module.parameters():
            param.data = 0.5 * param.data
        try:
            engine.save_checkpoint(folder, tag="other")
        except ValueError as error:
            found["refusal"] = str(error)
        engine.load_checkpoint(folder, tag="equal")
        loaded = snapshot(engine.module)
        train(engine, 2, start=2)
        found["going on"] = snapshot(engine.module)
    with engine_of(ds_config(grass=UNIFORM)) as engine:
        engine.load_checkpoint(folder, tag="equal")
        train(engine, 2, start=2)
        found["resumed"] = snapshot(engine.module)
    return {**found, "saved": saved, "loaded": loaded}


def test_checkpoints_hold_what_training_holds(two_ranks: Any, tmp_path: Path) -> None:
    for found in two_ranks.run(saved_and_resumed, folder=tmp_path):
        assert "39 parameters were given other weights" in found["refusal"]
        assert "(first: lm_head.weight)" in found["refusal"]
        assert difference(found["loaded"], found["saved"]) is None
        assert difference(found["resumed"], found["going on"]) is None
    assert not (tmp_path / "other").exists()


def train_halved(config: dict[str, Any], after: bool) -> dict[str, torch.Tensor]:
    """Train from halved weights: assigned before the engine was built, or after it, which then takes them over."""
    model = tiny_llama()

    def halve() -> None:
        for param in model.parameters():
            param.data = 0.5 * param.data

    if not after:
        halve()
    with engine_of(config, model=model) as engine:
        if after:
            halve()
            engine.optimizer.refresh_fp32_params()
        train(engine, 3)
        return snapshot(engine.module)


def test_other_weights_are_taken_over_on_request(two_ranks: Any) -> None:
    config = ds_config(dtype="bf16", grass=UNIFORM)
    after, before = (two_ranks.run(train_halved, config=config, after=after) for after in (True, False))
    assert difference(after, before) is None
