# SPDX-License-Identifier: Apache-2.0
"""``deepspeed.utils.safe_*`` on active, inactive and never drawn layers; and the model after ``destroy()``."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_full_optimizer_state,
)
from helpers import rounding
from helpers.models import (
    backward,
    batch,
    cyclic,
    ds_config,
    engine_of,
    grass_block,
    snapshot,
    split_groups,
    tiny_llama,
    train,
)
from helpers.observed import difference
from torch import nn

pytestmark = pytest.mark.dist

# Shards end in padding and inside parameters; on 4 ranks the norms of a layer leave the last rank nothing.
HIDDEN = 24
RESTING, ACTIVE, NEVER = 0, 1, 2  # layers, after one step of the ascending cycle
MOMENTS = ("exp_avg", "exp_avg_sq")


def plain_gradients(
    model: nn.Module, step: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], float]:
    """What a single process computes on the batches of all ranks, in float64; and how far off an engine's may be,
    whose model has ``dtype``.

    As part of a tensor's largest element: see :func:`helpers.rounding.apart`.
    """
    found, ids = [], torch.cat([batch(step, 0, rank) for rank in range(torch.distributed.get_world_size())])
    for precision in (torch.float64, dtype):
        plain = tiny_llama(hidden=HIDDEN).to(precision)
        plain.load_state_dict(model.state_dict())
        plain(input_ids=ids, labels=ids).loss.backward()
        found.append({name: param.grad for name, param in plain.named_parameters()})
    exact, narrow = found
    return exact, rounding.DRAWS * rounding.apart(narrow, exact)


def of_layer(model: nn.Module, layer: int) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if f"layers.{layer}." in name}


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Up to ``tolerance`` times the largest element."""
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max())


# ---- get ------------------------------------------------------------------------------------------------------------


def read_everything(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Check the answers for a resting, an active and a never drawn layer; return all fp32 weights."""
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(config, model, model_parameters=split_groups(model)) as engine:
        start, dtype = snapshot(model), model.lm_head.weight.dtype
        first, tolerance = plain_gradients(model, 0, dtype)
        train(engine, 1)
        assert engine.grass.active_layers == (ACTIVE,)
        for name, param in of_layer(model, RESTING).items():
            weights = safe_get_full_fp32_param(param)
            assert (weights.shape, weights.dtype) == (param.shape, torch.float32)
            assert torch.equal(weights.to(param.dtype), param)
            assert not torch.equal(weights, start[name].float())
            # after one AdamW step from zero
            assert close(safe_get_full_optimizer_state(param, "exp_avg"), 0.1 * first[name], tolerance)
            assert close(
                safe_get_full_optimizer_state(param, "exp_avg_sq"),
                0.001 * first[name].square(),
                (2 + tolerance) * tolerance,
            )
            assert safe_get_full_grad(param) is None
        for param in (*of_layer(model, NEVER).values(), model.lm_head.weight, model.model.embed_tokens.weight):
            assert torch.equal(safe_get_full_fp32_param(param), param.float())
            for key in MOMENTS:
                assert torch.equal(safe_get_full_optimizer_state(param, key), torch.zeros(param.shape))
            assert safe_get_full_grad(param) is None
        always = model.model.norm.weight
        assert safe_get_full_optimizer_state(always, "exp_avg").abs().max() > 0
        second, tolerance = plain_gradients(model, 1, dtype)
        assert tolerance < 0.5  # another tensor, or another rank's part of it, is off by 1
        backward(engine, 1)
        for name, param in [*of_layer(model, ACTIVE).items(), ("model.norm.weight", always)]:
            gradient = safe_get_full_grad(param)
            assert (gradient.shape, gradient.dtype) == (param.shape, torch.float32)
            assert close(gradient, second[name], tolerance), name
        assert all(safe_get_full_grad(param) is None for param in of_layer(model, RESTING).values())
        engine.step()
        return {name: safe_get_full_fp32_param(param) for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("pool", "stage", "dtype", "offload"),
    [
        ("two_ranks", 2, "fp32", "cpu"),
        ("two_ranks", 1, "bf16", "none"),
        ("four_ranks", 2, "bf16", "cpu"),
        ("four_ranks", 1, "fp32", "cpu"),
        ("one_rank", 2, "bf16", "cpu"),
    ],
)
def test_weights_state_and_gradient_of_active_and_inactive_layers(
    request: pytest.FixtureRequest, pool: str, stage: int, dtype: str, offload: str
) -> None:
    config = ds_config(stage=stage, dtype=dtype, lr=1e-2, grass=cyclic(offload={"device": offload}))
    first, *others = request.getfixturevalue(pool).run(read_everything, config=config)
    assert difference(others, [first] * len(others)) is None


def ask_for_what_there_is_not(config: dict[str, Any]) -> None:
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(config, model) as engine:
        active = model.model.layers[ACTIVE].mlp.up_proj.weight
        resting = model.model.layers[RESTING].mlp.up_proj.weight
        never = model.model.layers[NEVER].mlp.up_proj.weight
        if engine.grass.phase == "probe":
            backward(engine, 0)
            with pytest.raises(ValueError, match="not while probing"):
                safe_get_full_grad(active)
            engine.step()
            assert torch.equal(safe_get_full_fp32_param(active), active.float())
            assert safe_get_full_optimizer_state(active, "exp_avg").count_nonzero() == 0
            return
        train(engine, 1)
        for moment in ("before backward", "after step"):
            current = active if moment == "before backward" else never
            with pytest.raises(ValueError, match="after backward and before step"):
                safe_get_full_grad(current)
            if moment == "before backward":
                train(engine, 1, start=1)
        for param in (resting, model.lm_head.weight):
            with pytest.raises(ValueError, match="not active"):
                safe_set_full_grad(param, torch.zeros(param.shape))
        with pytest.raises(ValueError, match=r"'momentum'.*exp_avg"):
            safe_get_full_optimizer_state(resting, "momentum")
        with pytest.raises(ValueError, match="never stepped"):
            safe_get_full_optimizer_state(model.lm_head.weight, "momentum")
        with pytest.raises(ValueError, match="never stepped"):
            safe_set_full_optimizer_state(model.lm_head.weight, torch.zeros(model.lm_head.weight.shape), "exp_avg")


@pytest.mark.parametrize("sampler", ["cyclic", "grass"])
def test_asking_for_what_there_is_not_says_so(two_ranks: Any, sampler: str) -> None:
    two_ranks.run(ask_for_what_there_is_not, config=ds_config(grass={**cyclic(), "sampler": sampler}))


# ---- set ------------------------------------------------------------------------------------------------------------


def write_and_read_back(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Every parameter of two layers gets its own values and must keep them, down to the last element of a shard."""
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(config, model, model_parameters=split_groups(model)) as engine:
        train(engine, 1)
        before = snapshot(model)
        wanted: dict[str, torch.Tensor] = {}
        for layer in (RESTING, NEVER):
            for number, (name, param) in enumerate(of_layer(model, layer).items()):
                values = (
                    torch.arange(param.numel(), dtype=torch.float32).view(param.shape) / 4096 + number + 10 * layer
                )
                wanted[name] = values
                safe_set_full_fp32_param(param, values)
                if layer == RESTING:
                    for factor, key in enumerate(MOMENTS, 2):
                        safe_set_full_optimizer_state(param, factor * values, key)
        named = dict(model.named_parameters())
        for name, values in wanted.items():
            assert torch.equal(safe_get_full_fp32_param(named[name]), values), name
            assert torch.equal(named[name], before[name])  # the model itself follows later
            if f"layers.{RESTING}." in name:
                for factor, key in enumerate(MOMENTS, 2):
                    assert torch.equal(safe_get_full_optimizer_state(named[name], key), factor * values), name
        for name, param in named.items():
            if name not in wanted:
                assert torch.equal(safe_get_full_fp32_param(param).to(param.dtype), before[name])
        # the step of NEVER takes its own new weights along (lr 0: nothing else happens to them), and RESTING's wait
        train(engine, 2, start=1)
        for name, values in wanted.items():
            expected = values.to(named[name].dtype) if f"layers.{NEVER}." in name else before[name]
            assert torch.equal(named[name], expected), name
        engine.optimizer.update_lp_params()
        for name, values in wanted.items():
            assert torch.equal(named[name], values.to(named[name].dtype)), name
        return snapshot(model)


@pytest.mark.parametrize(("pool", "stage", "dtype"), [("two_ranks", 1, "fp32"), ("four_ranks", 2, "bf16")])
def test_set_weights_and_state(request: pytest.FixtureRequest, pool: str, stage: int, dtype: str) -> None:
    ranks = request.getfixturevalue(pool).run(
        write_and_read_back, config=ds_config(stage=stage, dtype=dtype, lr=0.0, grass=cyclic())
    )
    assert difference(ranks, [ranks[0]] * len(ranks)) is None


def replace_gradients(config: dict[str, Any]) -> tuple[float, float]:
    """Zero gradients for all but one parameter of the active layer: only that one moves. Reported and true norm."""
    config["optimizer"]["params"]["weight_decay"] = 0.0
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(config, model) as engine:
        (layer,) = engine.grass.active_layers
        before = snapshot(model)
        for micro in range(engine.gradient_accumulation_steps()):
            if micro:
                engine.step()
            backward(engine, micro)
        chosen = f"model.layers.{layer}.self_attn.o_proj.weight"
        for name, param in [*of_layer(model, layer).items(), ("model.norm.weight", model.model.norm.weight)]:
            value = 10 * safe_get_full_grad(param) if name == chosen else torch.zeros(param.shape)
            safe_set_full_grad(param, value)
            assert torch.equal(safe_get_full_grad(param), value)
            if name == chosen:
                norm = float(value.norm())
        engine.step()
        changed = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
        assert changed == {chosen}
        return engine.get_global_grad_norm(), norm


@pytest.mark.parametrize(("pool", "gas"), [("two_ranks", 1), ("two_ranks", 2), ("four_ranks", 1)])
def test_set_gradients_are_the_ones_that_are_clipped_and_applied(
    request: pytest.FixtureRequest, pool: str, gas: int
) -> None:
    for reported, true in request.getfixturevalue(pool).run(
        replace_gradients, config=ds_config(gas=gas, clip=1.0, grass=cyclic())
    ):
        # as in DeepSpeed, which measures in step()
        assert reported == pytest.approx(true, rel=rounding.of_norm(HIDDEN * HIDDEN, 4))


def norm_of_ones(config: dict[str, Any]) -> tuple[float, int]:
    """The norm that is reported of gradients that are all one, and how many elements they have."""
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(config, model) as engine:
        backward(engine, 0)
        trained = [*of_layer(model, engine.grass.active_layers[0]).values(), model.model.norm.weight]
        for param in trained:
            safe_set_full_grad(param, torch.ones_like(safe_get_full_grad(param)))
        engine.step()
        return engine.get_global_grad_norm(), sum(getattr(param, "ds_numel", param.numel()) for param in trained)


@pytest.mark.parametrize(("pool", "stage"), [("two_ranks", 1), ("four_ranks", 2), ("two_ranks", 3)])
def test_norm_counts_every_element_once(request: pytest.FixtureRequest, pool: str, stage: int) -> None:
    ranks = request.getfixturevalue(pool)
    for norm, numel in ranks.run(norm_of_ones, config=ds_config(stage=stage, grass=cyclic())):
        # Sums of ones are exact. What rounds is a root and its square per shard, and the sums over ranks; the smallest parameter is far more.
        assert norm == pytest.approx(math.sqrt(numel), rel=(ranks.world + 2) * rounding.ROUNDOFF)
        assert (ranks.world + 2) * rounding.ROUNDOFF < HIDDEN / numel / 100


# ---- afterwards -----------------------------------------------------------------------------------------------------


def census(model: nn.Module) -> dict[str, Any]:
    """All that an engine may have left on a model."""
    found: dict[str, Any] = {}
    for name, param in model.named_parameters():
        hooks = len(param._post_accumulate_grad_hooks or ()) + len(param._backward_hooks or ())
        found[name] = (sorted(vars(param)), hooks, param.requires_grad, param.grad)
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        found[f"module {name}"] = sum(map(len, hooks))
    return found


def destroy_and_start_again(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(first, model) as engine:
        train(engine, 3)
    assert safe_get_full_fp32_param(model.lm_head.weight) is None
    weights = snapshot(model)
    fresh = tiny_llama(hidden=HIDDEN)
    fresh.load_state_dict({name: weight.float() for name, weight in weights.items()})
    losses = []
    for candidate in (model, fresh):
        with engine_of(second, candidate) as engine:
            losses.append(train(engine, 5))
    return {
        "losses": losses,
        "different": difference(snapshot(model), snapshot(fresh)),
        "moved": difference(snapshot(model), weights),
    }


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16")])
def test_a_model_survives_its_engine(two_ranks: Any, stage: int, dtype: str) -> None:
    first = ds_config(stage=stage, dtype=dtype, grass=cyclic())
    second = ds_config(stage=3 - stage, dtype=dtype, grass=grass_block(sampler="grass"))
    for result in two_ranks.run(destroy_and_start_again, first=first, second=second):
        assert result["losses"][0] == result["losses"][1]
        assert result["different"] is None
        assert result["moved"]


def leave_and_look(config: dict[str, Any]) -> dict[str, Any]:
    """What differs on a model after an engine came and went, and the gradients that plain torch then computes."""
    model = tiny_llama(hidden=HIDDEN)
    model.model.embed_tokens.weight.requires_grad_(False)  # frozen by the user, who shall find it so
    before = census(model)
    with engine_of(config, model) as engine:
        train(engine, 2)
        old = [weakref.ref(unit.flat.untyped_storage()) for unit in engine.optimizer.units]
        assert census(model) != before
    after = census(model)
    expected, tolerance = plain_gradients(model, 0)
    ids = torch.cat([batch(0, 0, number) for number in range(torch.distributed.get_world_size())])
    model(input_ids=ids, labels=ids).loss.backward()
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and not close(p.grad, expected[n], tolerance)]
    with engine_of(config, model) as second:  # moves the weights into flats of its own
        train(second, 1)
        gc.collect()
        kept = sum(storage() is not None for storage in old)
    return {"left": {name: seen for name, seen in after.items() if seen != before[name]}, "wrong": wrong, "kept": kept}


def test_destroy_leaves_nothing_on_the_model(two_ranks: Any) -> None:
    for result in two_ranks.run(leave_and_look, config=ds_config(gas=2, grass=cyclic())):
        assert result["left"] == {}
        assert (
            result["wrong"] == []
        )  # DeepSpeed's hooks would divide by the accumulation steps of an engine that is gone
        assert result["kept"] == 0  # or every train() of a process would keep one more copy of the weights
