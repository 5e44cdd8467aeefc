# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3: ``deepspeed.utils.safe_*_local_*`` on partitions, and ``GatheredParameters`` of any layer."""

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

pytestmark = pytest.mark.dist

# Parameters do not divide evenly, so that partitions end in padding.
HIDDEN = 24
RESTING, ACTIVE, NEVER = 0, 1, 2  # layers, after one step of the ascending cycle
MOMENTS = ("exp_avg", "exp_avg_sq")
FROZEN = "model.layers.3.mlp.up_proj.weight"  # by the user


def built(config: dict[str, Any]) -> Any:
    """An engine with two units per layer on a model with a frozen parameter."""
    model = tiny_llama(hidden=HIDDEN)
    model.get_parameter(FROZEN).requires_grad_(False)
    return engine_of(copy.deepcopy(config), model, model_parameters=split_groups(model))


# ---- this rank's part -----------------------------------------------------------------------------------------------


def mine(full: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, zeros behind its end."""
    part = -(-full.numel() // dist.get_world_size())
    flat = torch.nn.functional.pad(full.flatten(), (0, part * dist.get_world_size() - full.numel()))
    return flat[dist.get_rank() * part : (dist.get_rank() + 1) * part]


def read_and_write_parts(dtype: str) -> None:
    rank = dist.get_rank()
    with built(ds_config(stage=3, lr=0.0, dtype=dtype, grass=cyclic())) as engine:
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
    config = ds_config(stage=3, lr=0.0, dtype=dtype, grass=cyclic())
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
