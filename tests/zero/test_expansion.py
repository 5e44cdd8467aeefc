# SPDX-License-Identifier: Apache-2.0
"""Expansion: inactive layers above the lowest active one move by a sign step; all others stay still by the bit."""

from typing import Any

import pytest
import torch
from helpers.models import (
    LAYERS,
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

LR, EXPANSION = 1e-2, 0.125
RATE = LR * EXPANSION


def gradients(weights: dict[str, torch.Tensor], gas: int, step: int, world: int) -> dict[str, torch.Tensor]:
    """Those of one process on the batches of all ranks, float32."""
    model = tiny_llama()
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    for rank in range(world):
        for micro in range(gas):
            ids = batch(step, micro, rank)
            model(input_ids=ids, labels=ids).loss.div(gas * world).backward()
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def within(name: str, layer: str) -> bool:
    """Whether a parameter is in a layer of the sampler: a block, or a single matrix."""
    return name == layer or name.startswith(layer + ".")


def moves(config: dict[str, Any], steps: int, groups: bool) -> None:
    """Every step moves the expanded layers by RATE against the sign of the gradient, and no layer below them."""
    model = tiny_llama()
    depth = config["grass"].get("expansion_depth")
    arguments = {"model_parameters": split_groups(model)} if groups else {}
    maximized = config["optimizer"]["params"].get("maximize", False)
    with engine_of(config, model, **arguments) as engine:
        gas, world = engine.gradient_accumulation_steps(), engine.dp_world_size
        for step in range(steps):
            before, active = snapshot(model), engine.grass.active_layers
            drawn = {n: index for index, layer in enumerate(engine.grass.layers) for n in before if within(n, layer)}
            trained = {name for name, index in drawn.items() if index in active} | {"model.norm.weight"}
            lowest = min(layer_of(name) for name in trained & drawn.keys())
            lowest = lowest if depth is None else min(lowest, depth)
            names = {name for name in drawn.keys() - trained if layer_of(name) >= lowest}
            assert engine.grass.expanded_layers == tuple(sorted({drawn[name] for name in names}))
            exact = gradients(before, gas, step, world)
            train(engine, 1, start=step)
            after = snapshot(model)
            moved = {name for name in before if not torch.equal(before[name], after[name])}
            assert moved == names | trained, f"step {step}"
            # Both sides sum float32; one expanded layer more would add percents.
            norm = sum(float(exact[name].square().sum()) for name in trained) ** 0.5
            assert engine.get_global_grad_norm() == pytest.approx(norm, rel=1e-3)
            for name in names:
                # Where a gradient is so small that the order of a sum decides its sign, either is right.
                certain = exact[name].abs() > 1e-4 * exact[name].abs().max()
                expected = before[name] + (RATE if maximized else -RATE) * exact[name].sign()
                assert torch.equal(after[name][certain], expected[certain]), f"{name}, step {step}"
                assert certain.float().mean() > 0.9


BLOCK = cyclic(2, expansion=EXPANSION)


@pytest.mark.parametrize(
    ("stage", "gas", "settings", "groups"),
    [
        (2, 1, {}, False),
        (1, 2, {}, True),
        (2, 2, {"expansion_depth": 0}, False),
        (3, 1, {}, True),
        (3, 2, {}, False),
        (2, 1, {"sampler": "module", "module_budget": 0.15}, False),
        (3, 1, {"sampler": "module", "module_budget": 0.15}, False),
    ],
)
def test_inactive_layers_move_by_the_sign_of_the_gradient(
    two_ranks: Any, stage: int, gas: int, settings: dict[str, Any], groups: bool
) -> None:
    """With two param groups a layer is two units."""
    config = ds_config(stage=stage, gas=gas, lr=LR, grass={**BLOCK, **settings})
    two_ranks.run(moves, config=config, steps=2 * LAYERS + 2, groups=groups)


def test_an_optimizer_that_maximizes_moves_them_the_other_way(two_ranks: Any) -> None:
    config = ds_config(lr=LR, grass=BLOCK)
    config["optimizer"]["params"]["maximize"] = True
    two_ranks.run(moves, config=config, steps=2, groups=False)


def masters(config: dict[str, Any], steps: int) -> list[float]:
    """The fp32 weights that users see round to the model's, always."""
    from deepspeed.utils import safe_get_full_fp32_param

    model = tiny_llama()
    shares = []
    with engine_of(config, model) as engine:
        named = dict(model.named_parameters())
        for step in range(steps):
            train(engine, 1, start=step)
            weights = snapshot(model)
            cut_off = 0.0
            for name, param in named.items():
                master = safe_get_full_fp32_param(param)
                if master is not None:
                    assert torch.equal(master.to(weights[name].dtype), weights[name]), f"{name}, step {step}"
                    cut_off += float((master != weights[name].float()).float().mean()) * (layer_of(name) is not None)
            shares.append(cut_off)
    return shares


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("device", ["cpu", "none"])
def test_master_weights_follow(two_ranks: Any, stage: int, device: str) -> None:
    block = {**BLOCK, "offload": {"device": device}}
    (shares, _) = two_ranks.run(masters, config=ds_config(stage=stage, dtype="bf16", lr=LR, grass=block), steps=12)
    assert shares[-1] > 1  # what rounding had cut off is still there


def without_a_rate(config: dict[str, Any]) -> None:
    """Steps at a learning rate of 0 change nothing, whichever layers are active: none goes back to old master weights."""
    model = tiny_llama()
    with engine_of(config, model) as engine:
        train(engine, 2 * LAYERS + 1)  # all layers have master weights, and have moved without them since
        for group in engine.optimizer.param_groups:
            group["lr"] = 0.0
        before = snapshot(model)
        train(engine, 2 * LAYERS, start=2 * LAYERS + 1)
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("stage", "dtype", "device"), [(2, "fp32", "cpu"), (2, "bf16", "none"), (3, "bf16", "cpu")])
def test_a_layer_steps_from_where_it_has_moved_to(two_ranks: Any, stage: int, dtype: str, device: str) -> None:
    block = {**BLOCK, "offload": {"device": device}}
    two_ranks.run(without_a_rate, config=ds_config(stage=stage, dtype=dtype, lr=LR, grass=block))


def assigned(config: dict[str, Any]) -> None:
    """Master weights that the user sets become the weights before they move by a sign step."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    model = tiny_llama()
    with engine_of(config, model) as engine:
        train(engine, 2 * LAYERS)  # all layers have master weights
        assert engine.grass.expanded_layers == (1, 2, 3)
        name, param = next((n, p) for n, p in model.named_parameters() if "layers.3.mlp.up_proj" in n)
        safe_set_full_fp32_param(param, torch.full(safe_get_full_fp32_param(param).shape, 0.75))
        train(engine, 1, start=2 * LAYERS)
        step = (snapshot(model)[name].float() - 0.75).abs()
        moved = step != 0  # in bf16 the gradients of two ranks may cancel
        assert moved.sum() > 0.9 * moved.numel()
        assert torch.equal(step[moved], torch.full_like(step, config["optimizer"]["params"]["lr"] * EXPANSION)[moved])
        assert torch.equal(safe_get_full_fp32_param(param), snapshot(model)[name].float())


@pytest.mark.parametrize(("stage", "dtype"), [(2, "fp32"), (3, "bf16")])
def test_master_weights_that_were_set_are_not_lost(two_ranks: Any, stage: int, dtype: str) -> None:
    """The step is 2^-8, the distance of bf16 between 0.5 and 1, so nothing is rounded."""
    two_ranks.run(assigned, config=ds_config(stage=stage, dtype=dtype, lr=2.0**-5, grass=BLOCK))


def skipped(config: dict[str, Any], expanded: bool) -> None:
    """A step whose gradient is not finite in an active or an expanded layer moves nothing."""
    model = tiny_llama()
    with engine_of(config, model) as engine:
        train(engine, 2)
        before = snapshot(model)
        backward(engine, 2)
        reducer, unit = engine.optimizer.reducer, engine.optimizer._active[0]
        if expanded:
            (unit, *_) = engine.optimizer._expanded
            reducer.squares[unit].fill_(float("nan"))
        else:
            reducer.shards[unit][0] = float("inf")
        engine.step()
        after = snapshot(model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert engine.grass.memory()["gradients"]["device"] == 0


@pytest.mark.parametrize("expanded", [False, True])
def test_a_skipped_step_moves_nothing(two_ranks: Any, expanded: bool) -> None:
    two_ranks.run(skipped, config=ds_config(lr=LR, grass=BLOCK), expanded=expanded)


def dropped(config: dict[str, Any]) -> None:
    """A layer that this step's forward leaves out receives no gradient."""
    model = tiny_llama()
    with engine_of(config, model) as engine:
        assert engine.grass.expanded_layers == (1, 2, 3)
        handle = model.model.layers[3].register_forward_hook(lambda _, inputs, output: inputs[0])
        before = snapshot(model)
        train(engine, 1)
        handle.remove()
        after = snapshot(model)
        moved = {layer_of(name) for name in before if not torch.equal(before[name], after[name])}
        assert moved == {0, 1, 2, None}


def test_a_layer_without_a_gradient_stays(two_ranks: Any) -> None:
    two_ranks.run(dropped, config=ds_config(lr=LR, grass=BLOCK))


def final_weights(config: dict[str, Any], checkpointing: bool) -> dict[str, torch.Tensor]:
    model = tiny_llama().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with engine_of(config, model) as engine:
        train(engine, LAYERS)
        return snapshot(model)


@pytest.mark.parametrize("stage", [2, 3])
def test_activation_checkpointing_changes_no_bit(two_ranks: Any, stage: int) -> None:
    config = ds_config(stage=stage, dtype="bf16", lr=LR, grass=cyclic(1, expansion=EXPANSION))
    plain, recomputed = (two_ranks.run(final_weights, config=config, checkpointing=on)[0] for on in (False, True))
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
