# SPDX-License-Identifier: Apache-2.0
"""``deepspeed.utils.safe_*`` on active, inactive, never drawn and frozen layers, in every ZeRO stage."""

import math
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
    safe_update_full_grad_vectorized,
)
from helpers import rounding
from helpers.models import (
    backward,
    batch,
    cyclic,
    ds_config,
    engine_of,
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
FROZEN = "model.layers.3.mlp.up_proj.weight"  # by the user


def plain_gradients(
    model: nn.Module, step: int, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, torch.Tensor], float]:
    """What a single process computes on the batches of all ranks, in float64; and how far off an engine's may be,
    whose model has ``dtype``.

    As part of a tensor's largest element: see :func:`helpers.rounding.apart`.
    """
    found, ids = [], torch.cat([batch(step, 0, rank) for rank in range(torch.distributed.get_world_size())])
    weights = snapshot(model)
    for precision in (torch.float64, dtype):
        plain = tiny_llama(hidden=HIDDEN).to(precision)
        plain.load_state_dict(weights)
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
    """Check the answers for a resting, an active, a never drawn and a frozen layer; return all fp32 weights."""
    model = tiny_llama(hidden=HIDDEN)
    frozen = model.get_parameter(FROZEN).requires_grad_(False)
    with engine_of(config, model, model_parameters=split_groups(model)) as engine:
        start, dtype = snapshot(model), model.lm_head.weight.dtype
        first, tolerance = plain_gradients(model, 0, dtype)
        train(engine, 1)
        assert engine.grass.active_layers == (ACTIVE,)
        now = snapshot(model)
        for name, param in of_layer(model, RESTING).items():
            weights = safe_get_full_fp32_param(param)
            assert (weights.shape, weights.dtype) == (now[name].shape, torch.float32)
            assert torch.equal(weights.to(dtype), now[name])
            assert not torch.equal(weights, start[name].float())
            # after one AdamW step from zero
            assert close(safe_get_full_optimizer_state(param, "exp_avg"), 0.1 * first[name], tolerance)
            assert close(
                safe_get_full_optimizer_state(param, "exp_avg_sq"),
                0.001 * first[name].square(),
                (2 + tolerance) * tolerance,
            )
            assert safe_get_full_grad(param) is None
        for name in (*of_layer(model, NEVER), "lm_head.weight", "model.embed_tokens.weight"):
            param = model.get_parameter(name)
            assert torch.equal(safe_get_full_fp32_param(param), now[name].float())
            for key in MOMENTS:
                assert torch.equal(safe_get_full_optimizer_state(param, key), torch.zeros(now[name].shape))
            assert safe_get_full_grad(param) is None
        assert safe_get_full_fp32_param(frozen) is safe_get_full_optimizer_state(frozen, "exp_avg") is None
        always = model.model.norm.weight
        assert safe_get_full_optimizer_state(always, "exp_avg").abs().max() > 0
        second, tolerance = plain_gradients(model, 1, dtype)
        assert tolerance < 0.5  # another tensor, or another rank's part of it, is off by 1
        backward(engine, 1)
        for name, param in [*of_layer(model, ACTIVE).items(), ("model.norm.weight", always)]:
            gradient = safe_get_full_grad(param)
            assert (gradient.shape, gradient.dtype) == (now[name].shape, torch.float32)
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
        ("two_ranks", 3, "fp32", "cpu"),
        ("four_ranks", 3, "bf16", "none"),
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
            weights = snapshot(model)[f"model.layers.{ACTIVE}.mlp.up_proj.weight"]
            assert torch.equal(safe_get_full_fp32_param(active), weights)
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
                safe_set_full_grad(param, torch.zeros(1))
        with pytest.raises(ValueError, match=r"'momentum'.*exp_avg"):
            safe_get_full_optimizer_state(resting, "momentum")
        with pytest.raises(ValueError, match="never stepped"):
            safe_get_full_optimizer_state(model.lm_head.weight, "momentum")
        with pytest.raises(ValueError, match="never stepped"):
            safe_set_full_optimizer_state(model.lm_head.weight, torch.zeros(1), "exp_avg")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("sampler", ["cyclic", "grass"])
def test_asking_for_what_there_is_not_says_so(two_ranks: Any, sampler: str, stage: int) -> None:
    config = ds_config(stage=stage, grass={**cyclic(), "sampler": sampler})
    two_ranks.run(ask_for_what_there_is_not, config=config)


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
                shape = before[name].shape
                wanted[name] = values = torch.arange(shape.numel()).view(shape) / 4096 + number + 10 * layer
                safe_set_full_fp32_param(param, values)
                if layer == RESTING:
                    for factor, key in enumerate(MOMENTS, 2):
                        safe_set_full_optimizer_state(param, factor * values, key)
        named = dict(model.named_parameters())
        assert difference(snapshot(model), before) is None  # the model itself follows later
        for name, values in wanted.items():
            assert torch.equal(safe_get_full_fp32_param(named[name]), values), name
            if f"layers.{RESTING}." in name:
                for factor, key in enumerate(MOMENTS, 2):
                    assert torch.equal(safe_get_full_optimizer_state(named[name], key), factor * values), name
        for name, param in named.items():
            if name not in wanted:
                assert torch.equal(safe_get_full_fp32_param(param).to(param.dtype), before[name])
        # the step of NEVER takes its own new weights along (lr 0: nothing else happens to them), and RESTING's wait
        train(engine, 2, start=1)
        rounded = {name: values.to(before[name].dtype) for name, values in wanted.items()}
        stepped = {name: values for name, values in rounded.items() if f"layers.{NEVER}." in name}
        assert difference(snapshot(model), before | stepped) is None
        engine.optimizer.update_lp_params()
        assert difference(snapshot(model), before | rounded) is None
        return snapshot(model)


@pytest.mark.parametrize(
    ("pool", "stage", "dtype"), [("two_ranks", 1, "fp32"), ("four_ranks", 2, "bf16"), ("two_ranks", 3, "bf16")]
)
def test_set_weights_and_state(request: pytest.FixtureRequest, pool: str, stage: int, dtype: str) -> None:
    ranks = request.getfixturevalue(pool).run(
        write_and_read_back, config=ds_config(stage=stage, dtype=dtype, lr=0.0, grass=cyclic())
    )
    assert difference(ranks, [ranks[0]] * len(ranks)) is None


def replace_gradients(config: dict[str, Any]) -> tuple[float, float]:
    """Double all gradients; then zeros for all but one parameter of the active layer: only that one moves.

    Returns the reported and the true norm.
    """
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
        trained = [*of_layer(model, layer).items(), ("model.norm.weight", model.model.norm.weight)]
        doubled = [2 * safe_get_full_grad(param) for _, param in trained]
        safe_update_full_grad_vectorized([param for _, param in trained], lambda gradient, _: 2 * gradient)
        for (name, param), twice in zip(trained, doubled, strict=True):
            assert torch.equal(safe_get_full_grad(param), twice)
            value = 10 * twice if name == chosen else torch.zeros_like(twice)
            safe_set_full_grad(param, value)
            assert torch.equal(safe_get_full_grad(param), value)
            if name == chosen:
                norm = float(value.norm())
        engine.step()
        changed = {name for name, weight in snapshot(model).items() if not torch.equal(weight, before[name])}
        assert changed == {chosen}
        return engine.get_global_grad_norm(), norm


@pytest.mark.parametrize(
    ("pool", "stage", "gas"), [("two_ranks", 1, 2), ("two_ranks", 2, 2), ("four_ranks", 2, 1), ("two_ranks", 3, 1)]
)
def test_set_gradients_are_the_ones_that_are_clipped_and_applied(
    request: pytest.FixtureRequest, pool: str, stage: int, gas: int
) -> None:
    config = ds_config(stage=stage, gas=gas, clip=1.0, grass=cyclic())
    for reported, true in request.getfixturevalue(pool).run(replace_gradients, config=config):
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
