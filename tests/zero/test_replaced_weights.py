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


STAGES: dict[str, dict[str, Any]] = {
    "zero1": {"stage": 1},
    "zero2": {},
    "zero3-kept": {"stage": 3},  # small weights stay gathered
    "zero3": {"stage": 3, "zero_optimization": RELEASED},
}
DISTURBANCES = {"nothing": lambda model: None, "average": average_swap, "move": there_and_back}


def disturbed(config: dict[str, Any], what: str) -> dict[str, torch.Tensor]:
    with engine_of(config) as engine:
        train(engine, 2)
        DISTURBANCES[what](engine.module)
        train(engine, 3, start=2)
        return snapshot(engine.module)


CONFIGS = {
    "zero1-full": ds_config(stage=1, grass={"sampler": "full"}),
    "zero1-uniform": ds_config(stage=1, grass=UNIFORM),
    "zero2-uniform": ds_config(grass=UNIFORM),
    "zero2-bf16": ds_config(dtype="bf16", grass=UNIFORM),
    "zero3-uniform": ds_config(stage=3, grass=UNIFORM, zero_optimization=RELEASED),
    "zero3-kept": ds_config(stage=3, grass=UNIFORM),  # small weights stay gathered
}


@pytest.mark.parametrize("name", tiered(CONFIGS, "zero1-full", "zero2-uniform", "zero3-kept"))
def test_training_goes_on_as_if_nothing_had_happened(two_ranks: Any, name: str) -> None:
    untouched = two_ranks.run(disturbed, config=CONFIGS[name], what="nothing")
    for what in ("average", "move"):
        found = two_ranks.run(disturbed, config=CONFIGS[name], what=what)
        assert difference(found, untouched) is None, what


def assigned_before_the_step(config: dict[str, Any], assign: bool) -> dict[str, Any]:
    """Assign other weights between backward and step, also while probing (steps 0 and 1), and leave them there."""
    with engine_of(config) as engine:
        for step in range(5):
            backward(engine, step)
            if assign:
                for param in engine.module.parameters():
                    param.data = 0.5 * param.data
            engine.step()
        return {"weights": snapshot(engine.module), "scores": engine.grass.scores}


SCORED = {name: ds_config(**more, grass=grass_block()) for name, more in STAGES.items()}


@pytest.mark.parametrize("name", tiered(STAGES, "zero2", "zero3-kept"))
def test_assigned_weights_last_until_the_next_step(two_ranks: Any, name: str) -> None:
    """Also in layers that do not train, and where the step only measures."""
    untouched = two_ranks.run(assigned_before_the_step, config=SCORED[name], assign=False)
    assigned = two_ranks.run(assigned_before_the_step, config=SCORED[name], assign=True)
    assert difference(assigned, untouched) is None


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
