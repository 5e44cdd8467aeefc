# SPDX-License-Identifier: Apache-2.0
"""The model after its engine: destroyed, destroyed twice, or failed while it was built."""

import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from helpers import rounding
from helpers.models import batch, cyclic, ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.observed import difference
from torch import nn

from grass_ds.core import deepspeed_compat
from grass_ds.zero.stage3 import GrassZero3Optimizer

pytestmark = pytest.mark.dist
STEPS = 4


def census(model: nn.Module) -> dict[str, int]:
    """All that an engine may leave on a model, by kind. What zero.Init puts on partitioned parameters stays there."""
    modules, params = list(model.modules()), list(model.parameters())
    return {
        "forward hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules),
        "backward hooks": sum(len(m._backward_hooks) + len(m._backward_pre_hooks) for m in modules),
        "gradient hooks": sum(len(p._post_accumulate_grad_hooks or ()) + len(p._backward_hooks or ()) for p in params),
        "functions of modules": sum(name in vars(m) for m in modules for name in deepspeed_compat.LEFT_ON_MODULES),
        "attributes": sum(len(vars(p)) for p in params if not hasattr(p, "ds_id")),
        "safe functions": sum(hasattr(p, "_z3_optimizer") for p in params),
        "frozen": sum(not p.requires_grad for p in params),
        "gradients": sum(p.grad is not None for p in params),
    }


def left(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {kind: count - before[kind] for kind, count in after.items() if count > before[kind]}


# ---- destroy() ------------------------------------------------------------------------------------------------------


def destroy_and_start_again(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two engines after another on one model, and the second one on a new model with the same weights."""
    model = tiny_llama()
    before = census(model)
    with engine_of(first, model) as engine:
        train(engine, 3)
        gone = weakref.ref(engine.optimizer)
    del engine
    gc.collect()
    if first["zero_optimization"]["stage"] < 3:  # where nothing on the parameter answers, DeepSpeed raises
        assert safe_get_full_fp32_param(model.lm_head.weight) is None
    found: dict[str, Any] = {"left": left(before, census(model)), "alive": gone() is not None}
    weights, fresh = snapshot(model), tiny_llama()
    fresh.load_state_dict({name: weight.float() for name, weight in weights.items()})
    losses = []
    for candidate in (model, fresh):
        with engine_of(second, candidate) as engine:
            losses.append(train(engine, 5))
    different = difference(snapshot(model), snapshot(fresh))
    return {**found, "losses": losses, "different": different, "moved": difference(snapshot(model), weights)}


@pytest.mark.parametrize(("stage", "then", "dtype"), [(1, 2, "fp32"), (2, 1, "bf16"), (3, 3, "fp32")])
def test_a_second_engine_on_the_model_starts_afresh(two_ranks: Any, stage: int, then: int, dtype: str) -> None:
    first = ds_config(stage=stage, dtype=dtype, grass=cyclic())
    second = ds_config(stage=then, dtype=dtype, grass=grass_block(sampler="grass"))
    for result in two_ranks.run(destroy_and_start_again, first=first, second=second):
        assert (result["left"], result["alive"]) == ({}, False)
        assert result["losses"][0] == result["losses"][1]
        assert result["different"] is None
        assert result["moved"]


def leave_and_look(config: dict[str, Any]) -> dict[str, Any]:
    """What differs on a model after an engine came and went, and the gradients that plain torch then computes."""
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)  # frozen by the user, who shall find it so
    before = census(model)
    with engine_of(config, model) as engine:
        train(engine, 2)
        old = [weakref.ref(unit.flat.untyped_storage()) for unit in engine.optimizer.units]
        assert census(model) != before
    after, weights, gradients = census(model), snapshot(model), []
    ids = batch(0, 0, 0)
    for dtype in (torch.float64, torch.float32):
        plain = tiny_llama().to(dtype)
        plain.load_state_dict(weights)
        plain(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: param.grad for name, param in plain.named_parameters()})
    model(input_ids=ids, labels=ids).loss.backward()
    mine = {name: param.grad for name, param in model.named_parameters() if param.requires_grad}
    exact, narrow = gradients
    error = rounding.apart(mine, exact) / (rounding.DRAWS * rounding.apart(narrow, exact))
    with engine_of(config, model) as second:  # moves the weights into flats of its own
        train(second, 1)
        gc.collect()
        kept = sum(storage() is not None for storage in old)
    return {"same": after == before, "error": error, "kept": kept}


def test_destroy_leaves_nothing_on_the_model(two_ranks: Any) -> None:
    for result in two_ranks.run(leave_and_look, config=ds_config(gas=2, grass=cyclic())):
        assert result["same"]
        assert (
            result["error"] <= 1
        )  # DeepSpeed's hooks would divide by the accumulation steps of an engine that is gone
        assert result["kept"] == 0  # or every train() of a process would keep one more copy of the weights


def destroy_twice(config: dict[str, Any]) -> None:
    """An engine that is collected late destroys itself once more; the model has another engine by then."""
    model = tiny_llama()
    with engine_of(config, model) as first:
        train(first, 1)
    with engine_of(config, model) as second:
        before = census(model)
        first.destroy()
        assert census(model) == before
        train(second, STEPS)


@pytest.mark.parametrize("stage", [2, 3])
def test_an_engine_destroyed_twice_spares_the_next(two_ranks: Any, stage: int) -> None:
    two_ranks.run(destroy_twice, config=ds_config(stage=stage, grass=grass_block()))


# ---- errors within --------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Any, str]] = {
    "before the units": (deepspeed_compat.DeepSpeedZeRoOffload, "mark_persistent_parameters"),
    "in the wrapper": (GrassZero3Optimizer, "activate"),
    "after the wrapper": (deepspeed_compat.DeepSpeedEngine, "_configure_checkpointing"),
}


def trained(config: dict[str, Any], model: nn.Module) -> Any:
    with engine_of(config, model) as engine:
        return train(engine, STEPS), snapshot(model)


def fail_and_try_again(owner: Any, method: str, config: dict[str, Any]) -> dict[str, Any]:
    model = tiny_llama()
    before, client = census(model), torch.optim.AdamW(model.parameters())
    own = {key: value for key, value in config.items() if key != "optimizer"}
    try:
        fault = mock.patch.object(owner, method, side_effect=RuntimeError("injected"))
        with fault, engine_of(own, model, optimizer=client):
            message = ""
    except RuntimeError as error:
        message = str(error)
    return {
        "message": message,
        "left": left(before, census(model)),
        "optimizer": [id(param) for param in client.param_groups[0]["params"]] == [id(p) for p in model.parameters()],
        "again": difference(trained(config, model), trained(config, tiny_llama())),
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_within_leaves_a_model_that_can_be_used(two_ranks: Any, fault: str) -> None:
    owner, method = FAULTS[fault]
    config = ds_config(stage=3, grass=grass_block())
    for found in two_ranks.run(fail_and_try_again, owner=owner, method=method, config=config):
        assert found == {"message": "injected", "left": {}, "optimizer": True, "again": None}
