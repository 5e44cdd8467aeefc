# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3: ``deepspeed.utils.safe_*`` as in ZeRO-2, and on partitions; ``GatheredParameters`` of any layer."""

import copy
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed import utils
from helpers.models import (
    backward,
    batch,
    cyclic,
    ds_config,
    engine_of,
    layer_of,
    snapshot,
    split_groups,
    tiny_llama,
    train,
)
from helpers.same_arithmetic import same_arithmetic
from torch import nn

pytestmark = pytest.mark.dist

# Parameters do not divide evenly, so that partitions end in padding.
HIDDEN = 24
RESTING, ACTIVE, NEVER = 0, 1, 2  # layers, after one step of the ascending cycle
MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN = "model.layers.3.mlp.up_proj.weight"  # by the user


def config_of(stage: int, lr: float = 1e-2, dtype: str = "fp32", **settings: Any) -> dict[str, Any]:
    return ds_config(stage=stage, dtype=dtype, lr=lr, grass={**cyclic(), **settings})


def built(config: dict[str, Any]) -> Any:
    """An engine with two units per layer on a model with a frozen parameter."""
    model = tiny_llama(hidden=HIDDEN)
    model.get_parameter(FROZEN).requires_grad_(False)
    return engine_of(copy.deepcopy(config), model, model_parameters=split_groups(model))


# ---- full tensors, as in ZeRO-2 -------------------------------------------------------------------------------------


def everything(params: dict[str, nn.Parameter], gradients: bool) -> dict[str, Any]:
    """What the functions that read say of all parameters."""
    found: dict[str, Any] = {f"fp32 {n}": utils.safe_get_full_fp32_param(p) for n, p in params.items()}
    for key in MOMENTS:
        found |= {f"{key} {n}": utils.safe_get_full_optimizer_state(p, key) for n, p in params.items()}
    if gradients:
        found |= {f"gradient {n}": utils.safe_get_full_grad(p) for n, p in params.items()}
    return found


def a_run_of_all_functions(config: dict[str, Any]) -> dict[str, Any]:
    """Reads, writes and trains; all that was read on the way."""
    with built(config) as engine:
        params = dict(engine.module.named_parameters())
        seen = {"start": everything(params, gradients=False)}
        if engine.grass.phase == "probe":
            backward(engine, 0)
            with pytest.raises(ValueError, match="not while probing"):
                utils.safe_get_full_grad(params["model.layers.0.mlp.up_proj.weight"])
            engine.step()
            return {**seen, "probing": everything(params, gradients=False)}
        train(engine, 1)
        assert engine.grass.active_layers == (ACTIVE,)
        seen["trained"] = everything(params, gradients=False)
        backward(engine, 1)
        seen["gradients"] = everything(params, gradients=True)
        utils.safe_update_full_grad_vectorized(list(params.values()), lambda grad, param: 2 * grad)
        seen["doubled"] = everything(params, gradients=True)
        chosen = params[f"model.layers.{ACTIVE}.mlp.up_proj.weight"]
        utils.safe_set_full_grad(chosen, torch.full_like(utils.safe_get_full_grad(chosen), 0.5))
        seen["replaced"] = everything(params, gradients=True)
        engine.step()
        for name, param in params.items():
            if layer_of(name) in (RESTING, NEVER):
                value = utils.safe_get_full_fp32_param(param)
                utils.safe_set_full_fp32_param(param, value + 0.25)
                if layer_of(name) == RESTING:
                    for key in MOMENTS:
                        utils.safe_set_full_optimizer_state(param, value.abs(), key)
        seen["written"] = everything(params, gradients=False)
        with pytest.raises(ValueError, match="not active"):
            utils.safe_set_full_grad(params[f"model.layers.{RESTING}.mlp.up_proj.weight"], torch.zeros(1))
        train(engine, 3, start=2)
        engine.optimizer.update_lp_params()
        return {**seen, "end": everything(params, gradients=False), "weights": snapshot(engine.module)}


def all_stages(settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    with same_arithmetic():
        return {stage: a_run_of_all_functions(config_of(stage, **settings)) for stage in (2, 3)}


@pytest.mark.parametrize(
    ("pool", "settings"),
    [("two_ranks", {"offload": {"device": "none"}}), ("two_ranks", {"sampler": "grass"})],
    ids=["training", "probing"],
)
def test_full_tensors_are_those_of_zero2(request: pytest.FixtureRequest, pool: str, settings: dict[str, Any]) -> None:
    for stages in request.getfixturevalue(pool).run(all_stages, settings=settings):
        for moment, expected in stages[2].items():
            for name, value in expected.items():
                found = stages[3][moment][name]
                assert (found is None) == (value is None), f"{moment}: {name}"
                if value is not None:
                    assert (found.shape, found.dtype) == (value.shape, torch.float32)
                    assert torch.equal(found, value), f"{moment}: {name}"
        frozen = {name for moment in stages[3].values() for name, v in moment.items() if v is None and FROZEN in name}
        assert frozen >= {f"fp32 {FROZEN}", f"exp_avg {FROZEN}"}
        if "gradients" in stages[3]:
            shown = {
                layer_of(n) for n, v in stages[3]["gradients"].items() if n.startswith("gradient") and v is not None
            }
            assert shown == {ACTIVE, None}


# ---- this rank's part -----------------------------------------------------------------------------------------------


def mine(full: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, zeros behind its end."""
    part = -(-full.numel() // dist.get_world_size())
    flat = torch.nn.functional.pad(full.flatten(), (0, part * dist.get_world_size() - full.numel()))
    return flat[dist.get_rank() * part : (dist.get_rank() + 1) * part]


def read_and_write_parts(dtype: str) -> None:
    rank = dist.get_rank()
    with built(config_of(3, lr=0.0, dtype=dtype)) as engine:
        params: dict[str, Any] = dict(engine.module.named_parameters())
        frozen = params.pop(FROZEN)
        train(engine, 1)
        backward(engine, 1)
        for name, param in params.items():
            assert torch.equal(utils.safe_get_local_fp32_param(param), mine(utils.safe_get_full_fp32_param(param))), (
                name
            )
            for key in MOMENTS:
                full = utils.safe_get_full_optimizer_state(param, key)
                assert torch.equal(utils.safe_get_local_optimizer_state(param, key), mine(full))
            gradient, whole = utils.safe_get_local_grad(param), utils.safe_get_full_grad(param)
            assert (
                (gradient is None)
                == (whole is None)
                == (layer_of(name) not in (ACTIVE, None) or not param.requires_grad)
            )
            assert gradient is None or torch.equal(gradient, mine(whole))
        assert utils.safe_get_local_fp32_param(frozen) is utils.safe_get_local_grad(frozen) is None
        assert utils.safe_get_local_optimizer_state(frozen, "exp_avg") is None

        resting, active, never = (params[f"model.layers.{n}.mlp.up_proj.weight"] for n in (RESTING, ACTIVE, NEVER))
        part = utils.safe_get_local_fp32_param(resting).numel()
        value = torch.arange(part, dtype=torch.float32) + 1000 * (rank + 1)
        for param in (resting, never):
            utils.safe_set_local_fp32_param(param, value)
            assert torch.equal(mine(utils.safe_get_full_fp32_param(param)), value)
        utils.safe_set_local_optimizer_state(resting, value / 2, "exp_avg_sq")
        assert torch.equal(mine(utils.safe_get_full_optimizer_state(resting, "exp_avg_sq")), value / 2)
        utils.safe_set_local_grad(active, value / 4)
        assert torch.equal(mine(utils.safe_get_full_grad(active)).float(), (value / 4).to(active.dtype).float())
        # neighbours in the same shard keep their own
        other = params[f"model.layers.{RESTING}.mlp.gate_proj.weight"]
        assert torch.equal(
            utils.safe_get_full_fp32_param(other).to(other.dtype),
            snapshot(engine.module)[FROZEN.replace("3.mlp.up", "0.mlp.gate")],
        )
        with pytest.raises(ValueError, match=rf"the partition has {part} elements, the value {part + 1}"):
            utils.safe_set_local_fp32_param(resting, torch.zeros(part + 1))
        with pytest.raises(ValueError, match="not active"):
            utils.safe_set_local_grad(never, value)
        with pytest.raises(ValueError, match="never stepped"):
            utils.safe_set_local_optimizer_state(params["lm_head.weight"], value, "exp_avg")
        engine.step()
        engine.optimizer.update_lp_params()
        assert torch.equal(
            mine(snapshot(engine.module)[f"model.layers.{NEVER}.mlp.up_proj.weight"]), value.to(never.dtype)
        )


@pytest.mark.parametrize(("pool", "dtype"), [("two_ranks", "fp32"), ("four_ranks", "bf16")])
def test_local_tensors_are_this_ranks_part(request: pytest.FixtureRequest, pool: str, dtype: str) -> None:
    request.getfixturevalue(pool).run(read_and_write_parts, dtype=dtype)


# ---- GatheredParameters ---------------------------------------------------------------------------------------------


def gather_and_change(dtype: str, threshold: int) -> None:
    config = config_of(3, lr=0.0, dtype=dtype)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    with built(config) as engine:
        params: dict[str, Any] = dict(engine.module.named_parameters())
        train(engine, 1)
        names = {n: f"model.layers.{n}.mlp.down_proj.weight" for n in (RESTING, ACTIVE, NEVER)}
        chosen = [*names.values(), FROZEN, "lm_head.weight", f"model.layers.{NEVER}.input_layernorm.weight"]
        before = snapshot(engine.module)
        for name in chosen:
            with deepspeed.zero.GatheredParameters([params[name]]):
                assert torch.equal(params[name], before[name])
                if name != FROZEN:
                    assert torch.equal(
                        params[name], utils.safe_get_full_fp32_param(params[name]).to(params[name].dtype)
                    )
        ids = batch(0, 0, 0)
        first = engine(input_ids=ids, labels=ids).loss.item()
        engine.module.eval()
        for name in chosen:
            with deepspeed.zero.GatheredParameters([params[name]], modifier_rank=0), torch.no_grad():
                if dist.get_rank() == 0:
                    params[name].add_(0.5)
        changed = {name: before[name] + 0.5 if name in chosen else weight for name, weight in before.items()}

        def same(expected: dict[str, torch.Tensor]) -> list[str]:
            now = snapshot(engine.module)
            return [name for name, weight in expected.items() if not torch.equal(weight, now[name])]

        assert same(changed) == []
        with torch.no_grad():
            assert engine(input_ids=ids, labels=ids).loss.item() != first  # the model computes with them
        for unit in engine.optimizer.units:  # and they are where the step will write
            for slot, name in enumerate(unit.param_names):
                start, place, size = unit.overlap(slot)
                whole = changed[name].flatten()
                assert torch.equal(unit.shard[place : place + size], whole[start : start + size])
        engine.module.train()
        train(engine, 2, start=1)  # ACTIVE and NEVER, for the first time: from what was written (lr is 0)
        assert same(changed) == []
        assert torch.equal(utils.safe_get_full_fp32_param(params[names[NEVER]]), changed[names[NEVER]].float())
        train(engine, 2, start=3)  # the last layer, then RESTING again: its own fp32 weights win, as in DeepSpeed
        assert same(changed) == [names[RESTING]]
        assert same({names[RESTING]: before[names[RESTING]]}) == []
        with deepspeed.zero.GatheredParameters([params[names[RESTING]]], modifier_rank=0), torch.no_grad():
            params[names[RESTING]].add_(0.5 if dist.get_rank() == 0 else 7)
        engine.optimizer.refresh_fp32_params()
        train(engine, 4, start=5)
        assert same(changed) == []


@pytest.mark.parametrize(("dtype", "threshold"), [("fp32", 0), ("bf16", 100), ("fp32", 10**9)])
def test_gathered_parameters_of_any_layer(two_ranks: Any, dtype: str, threshold: int) -> None:
    two_ranks.run(gather_and_change, dtype=dtype, threshold=threshold)
