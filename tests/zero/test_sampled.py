# SPDX-License-Identifier: Apache-2.0
"""A sampled run: inactive layers do not move by a bit, active ones by exactly the AdamW step of a single process."""

import hashlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from helpers import rounding
from helpers.models import (
    RELEASED,
    backward,
    batch,
    cyclic,
    ds_config,
    engine_of,
    grass_block,
    layer_of,
    snapshot,
    tiny_llama,
    train,
    without_optimizer,
)
from helpers.reference import Reference
from helpers.tiered import tiered
from torch import nn

from grass_ds import GrassConfigError

pytestmark = pytest.mark.dist

# 24 makes units that do not divide by the ranks, so that shards end in padding and parameters straddle ranks.
HIDDEN, LAYERS, PERIOD = 24, 4, 2
STEPS = PERIOD * (LAYERS + 1)  # through all layers and back to the first, which by then rested for three periods
LR = 1e-2  # large enough to move every bf16 weight in one step


def trained_names(model: nn.Module, layers: Iterable[int], by_weight: bool = False) -> set[str]:
    """Parameters of ``layers`` and of the final norm; ``by_weight``: the layers are the matrices of the blocks."""
    active, shapes = set(layers), {name: getattr(p, "ds_shape", p.shape) for name, p in model.named_parameters()}
    if by_weight:
        matrices = [name for name, shape in shapes.items() if layer_of(name) is not None and len(shape) > 1]
        return {"model.norm.weight", *(matrices[index] for index in active)}
    return {name for name in shapes if name == "model.norm.weight" or layer_of(name) in active}


def fingerprint(weights: dict[str, torch.Tensor]) -> str:
    """Hash of every bit of a :func:`snapshot`."""
    total = hashlib.sha256()
    for name, weight in weights.items():
        total.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights that rest on this rank: its partitions in ZeRO-3, all of them before."""
    return {name: getattr(param, "ds_tensor", param).detach().clone() for name, param in model.named_parameters()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in one if not torch.equal(one[name], other[name])}


def backward_all(engine: Any, step: int) -> None:
    """All micro-steps of one step up to the point where gradients are complete."""
    for micro in range(engine.gradient_accumulation_steps()):
        if micro:
            engine.step()
        backward(engine, step, micro)


# ---- who moves, and by how much ----------------------------------------------------------------------------------------------------


def one_group(name: str) -> dict[str, float]:
    return {"lr": LR, "weight_decay": 0.1}


def two_groups(name: str) -> dict[str, float]:
    """The usual split; both lr and decay differ, and an epsilon that one can see."""
    return {"lr": 2 * LR, "weight_decay": 0.0, "eps": 1e-5} if "norm" in name else {"lr": LR, "weight_decay": 0.2}


def split_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    groups = []
    for norm in (False, True):
        members = [(n, p) for n, p in model.named_parameters() if ("norm" in n) == norm]
        groups.append({"params": [p for _, p in members], **two_groups(members[0][0])})
    return torch.optim.AdamW(groups)


def clipped(engine: Any, gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``gradients`` after clipping by their global norm, which the engine must have reported."""
    limit = engine.gradient_clipping()
    norm = engine.get_global_grad_norm()
    exact = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
    longest = sum(gradient.numel() for gradient in gradients.values())
    assert norm == pytest.approx(exact, rel=rounding.of_norm(longest, torch.distributed.get_world_size()))
    if not limit:
        return gradients
    assert norm > limit  # or this case would not test clipping
    return {name: gradient * (1.0 / ((norm + 1e-6) / limit)) for name, gradient in gradients.items()}


def follow_with_same_gradients(config: dict[str, Any], split: bool) -> dict[str, Any]:
    """Exactly the active layers move, here and as a whole, by the bits of :class:`Reference`.

    Returns what the ranks must agree on, and the step counts of layer 0 after each of its steps.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    model, seen = tiny_llama(hidden=HIDDEN), []
    arguments: dict[str, Any] = {}
    if split:
        config = without_optimizer(config)
        arguments["optimizer"] = split_optimizer(model)
    with engine_of(config, model, **arguments) as engine:
        reference, counts = Reference(model, two_groups if split else one_group), []
        named, keeps = dict(model.named_parameters()), config["grass"]["state_on_switch"] == "keep"
        sampler = config["grass"]["sampler"]
        by_weight = sampler == "module"
        weights, here = snapshot(model), kept(model)
        for step in range(STEPS):
            before, before_here, active = weights, here, engine.grass.active_layers
            names = set() if engine.grass.phase == "probe" else trained_names(model, active, by_weight)
            backward_all(engine, step)
            gradients = {name: safe_get_full_grad(named[name]).clone() for name in sorted(names)}
            engine.step()
            if names:
                reference.step(clipped(engine, gradients))
            weights, here = snapshot(model), kept(model)
            assert differing(before, weights) == differing(before_here, here) == names, f"step {step}"
            for name in sorted(names):
                master = reference.masters[name].detach()
                assert torch.equal(weights[name], master.to(weights[name].dtype)), f"weights of {name}, step {step}"
                if keeps or active == engine.grass.active_layers:
                    assert torch.equal(safe_get_full_fp32_param(named[name]), master), f"master of {name}, step {step}"
            if active == (0,) and sampler == "cyclic":
                counts.append(reference.count("model.layers.0.mlp.up_proj.weight"))
            if not keeps:
                left = set(active) - set(engine.grass.active_layers)
                reference.forget(trained_names(model, left, by_weight) - {"model.norm.weight"}, weights)
            seen.append((active, fingerprint(weights)))
    return {"counts": counts, "seen": seen}


GATHERED = {"zero_optimization": RELEASED}
KEEP, RESET = cyclic(PERIOD, state_on_switch="keep"), cyclic(PERIOD, state_on_switch="reset")
UNIFORM = grass_block(sampler="uniform", num_active_layers=2, sample_period=1, state_on_switch="keep")
GRASS = grass_block(sampler="grass", sample_period=2, state_on_switch="keep")
MODULE = grass_block(sampler="module", module_budget=0.2, sample_period=2, state_on_switch="reset")  # of 28 matrices
OUTLIER = grass_block(sampler="outlier", outlier_threshold=2.0, sample_period=2, state_on_switch="keep")
# name -> (pool, settings, sampler's block, whether there are two param groups)
EXACT: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "zero2-keep": ("two_ranks", {}, KEEP, False),
    "zero2-bf16-reset-clip": ("two_ranks", {"dtype": "bf16", "clip": 0.05}, RESET, False),
    "zero1-bf16-keep-gas3-clip": ("two_ranks", {"stage": 1, "dtype": "bf16", "gas": 3, "clip": 0.05}, KEEP, False),
    "zero2-two-groups-reset": ("two_ranks", {}, RESET, True),
    "zero2-uniform-on-device": ("two_ranks", {"clip": 0.05}, {**UNIFORM, "offload": {"device": "none"}}, False),
    "zero2-grass-bf16": ("two_ranks", {"dtype": "bf16"}, GRASS, False),
    "zero1-bf16-two-groups-four-ranks": ("four_ranks", {"stage": 1, "dtype": "bf16"}, KEEP, True),
    "zero1-outlier-bf16": ("two_ranks", {"stage": 1, "dtype": "bf16"}, OUTLIER, False),
    "zero2-module-two-groups": ("two_ranks", {"clip": 0.005}, MODULE, True),
    "zero1-module-bf16-gas3-keep": (
        "two_ranks",
        {"stage": 1, "dtype": "bf16", "gas": 3},
        {**MODULE, "state_on_switch": "keep"},
        False,
    ),
    "zero3-module-bf16": ("two_ranks", {"stage": 3, "dtype": "bf16", **GATHERED}, MODULE, False),
    "zero3-module-prefetch": ("two_ranks", {"stage": 3}, {**MODULE, "state_on_switch": "keep"}, False),
    "zero2-bf16-one-rank": ("one_rank", {"dtype": "bf16"}, KEEP, False),
    "zero3-two-groups-keep": ("two_ranks", {"stage": 3}, KEEP, True),
    "zero3-bf16-reset-gas3-clip": (
        "two_ranks",
        {"stage": 3, "dtype": "bf16", "gas": 3, "clip": 0.05, **GATHERED},
        RESET,
        False,
    ),
    "zero3-uniform": ("two_ranks", {"stage": 3, "clip": 0.05}, UNIFORM, False),
    "zero3-grass-bf16": ("two_ranks", {"stage": 3, "dtype": "bf16"}, GRASS, False),
    "zero3-outlier": ("two_ranks", {"stage": 3}, OUTLIER, False),
    "zero3-one-rank": ("one_rank", {"stage": 3, **GATHERED}, KEEP, False),
    "zero3-bf16-two-groups-four-ranks": ("four_ranks", {"stage": 3, "dtype": "bf16", **GATHERED}, KEEP, True),
}


@pytest.mark.parametrize(
    "case",
    tiered(
        EXACT,
        "zero2-bf16-reset-clip",
        "zero1-bf16-keep-gas3-clip",
        "zero2-two-groups-reset",
        "zero2-uniform-on-device",
        "zero2-grass-bf16",
        "zero2-module-two-groups",
        "zero2-bf16-one-rank",
        "zero3-module-bf16",
        "zero3-two-groups-keep",
        "zero3-bf16-reset-gas3-clip",
        "zero3-bf16-two-groups-four-ranks",
    ),
)
def test_exactly_the_active_layers_move_by_the_adam_step_of_one_process(
    request: pytest.FixtureRequest, case: str
) -> None:
    pool, settings, block, split = EXACT[case]
    config = ds_config(lr=LR, grass=block, **settings)
    ranks = request.getfixturevalue(pool).run(follow_with_same_gradients, config=config, split=split)
    assert ranks == [ranks[0]] * len(ranks)
    active = [layers for layers, _ in ranks[0]["seen"]]
    assert len(set(active)) > 2  # there were switches
    if block["sampler"] == "cyclic":
        assert active == [((step // PERIOD) % LAYERS,) for step in range(STEPS)]
        # PERIOD steps at the start and PERIOD steps after three periods of rest
        assert ranks[0]["counts"] == ([1, 2, 3, 4] if block["state_on_switch"] == "keep" else [1, 2, 1, 2])


def follow_with_own_gradients(config: dict[str, Any]) -> tuple[float, float]:
    """Plain models of float64 and of float32 on the batches of all ranks; how far the engine and the float32 one are
    from the float64 one.

    The largest difference of a weight over the whole run, each.
    """
    import torch.distributed

    world, worst, noise = torch.distributed.get_world_size(), 0.0, 0.0
    model, plain = tiny_llama(hidden=HIDDEN), tiny_llama(hidden=HIDDEN)
    exact = rounding.wide(plain)
    with engine_of(config, model) as engine:
        parameters = config["optimizer"]["params"]
        hyper = {key: parameters[key] for key in ("lr", "weight_decay", "eps")}
        references = [
            (follower, Reference(follower, lambda name: hyper, follower.dtype)) for follower in (plain, exact)
        ]
        for step in range(STEPS):
            names = sorted(trained_names(model, engine.grass.active_layers))
            train(engine, 1, start=step)
            micros = range(engine.gradient_accumulation_steps())
            ids = torch.cat([batch(step, micro, rank) for micro in micros for rank in range(world)])
            for follower, reference in references:
                live, loss = dict(follower.named_parameters()), follower(input_ids=ids, labels=ids).loss
                gradients = torch.autograd.grad(loss, [live[name] for name in names])
                reference.step(dict(zip(names, gradients, strict=True)))
                with torch.no_grad():
                    for name in names:
                        live[name].copy_(reference.masters[name])
            truth = snapshot(exact)
            worst = max(worst, *(float((weight - truth[n]).abs().max()) for n, weight in snapshot(model).items()))
            noise = max(noise, *(float((weight - truth[n]).abs().max()) for n, weight in snapshot(plain).items()))
    return worst, noise


@pytest.mark.parametrize(
    ("pool", "stage", "gas"),
    tiered(
        [("two_ranks", 2, 1), ("two_ranks", 1, 2), ("four_ranks", 2, 2), ("two_ranks", 3, 2)],
        ("two_ranks", 1, 2),
        ("two_ranks", 3, 2),
    ),
)
def test_follows_a_plain_model_trained_on_the_batches_of_all_ranks(
    request: pytest.FixtureRequest, pool: str, stage: int, gas: int
) -> None:
    # Adam divides by the gradient's own size: a large epsilon keeps the rounding of near-zero gradients from being blown up.
    config = ds_config(stage=stage, gas=gas, grass=cyclic(PERIOD), optimizer={"type": "AdamW", "params": {}})
    config["optimizer"]["params"] = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4, "torch_adam": True}
    for worst, noise in request.getfixturevalue(pool).run(follow_with_own_gradients, config=config):
        assert worst <= rounding.DRAWS * noise
        assert (
            noise < config["optimizer"]["params"]["lr"] / 100
        )  # a gradient left out moves a weight by about lr in a step


def change_hyper_parameters(config: dict[str, Any]) -> dict[str, bool]:
    """Set lr to 0 in the second client group from the third step on. Which parameters of the active layers moved."""
    config = without_optimizer(config)
    model = tiny_llama(hidden=HIDDEN)
    moved = {}
    with engine_of(config, model, optimizer=split_optimizer(model)) as engine:
        train(engine, 2)
        engine.optimizer.param_groups[1]["lr"] = 0.0
        before, active = snapshot(model), engine.grass.active_layers
        train(engine, 1, start=2)
        for name in trained_names(model, active):
            moved[name] = not torch.equal(before[name], dict(model.named_parameters())[name])
    return moved


def test_hyper_parameters_of_the_client_groups_are_read_at_every_step(two_ranks: Any) -> None:
    for moved in two_ranks.run(change_hyper_parameters, config=ds_config(grass=cyclic(PERIOD))):
        assert len(moved) > 5
        assert all(changed == ("norm" not in name) for name, changed in moved.items())


class Counting(torch.optim.Optimizer):
    """Moves every weight by -lr times its step count, kept as a plain int per parameter, or per group."""

    def __init__(self, params: Any, per_group: bool):
        super().__init__(params, {"lr": 0.125, "step": 0} if per_group else {"lr": 0.125})
        self._per_group = per_group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                owner = group if self._per_group else self.state[param]
                owner["step"] = owner.get("step", 0) + 1
                param.sub_(group["lr"] * owner["step"])


def count_with(config: dict[str, Any], per_group: bool) -> dict[str, torch.Tensor]:
    config = without_optimizer(config)
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(config, model, optimizer=Counting(model.parameters(), per_group)) as engine:
        before = snapshot(model)
        train(engine, STEPS)
        return {name: before[name] - weight for name, weight in snapshot(model).items()}


def refuse_per_group(config: dict[str, Any]) -> None:
    with pytest.raises(GrassConfigError, match="counts steps per param group"):
        count_with(config, per_group=True)


def test_an_optimizer_that_counts_in_plain_numbers_counts_per_layer(two_ranks: Any) -> None:
    for moved in two_ranks.run(count_with, config=ds_config(grass=cyclic(PERIOD)), per_group=False):
        for name, difference in moved.items():
            layer = layer_of(name)
            steps = STEPS if "model.norm" in name else 0 if layer is None else 2 * PERIOD if layer == 0 else PERIOD
            # every step moves by a multiple of an eighth, and rounds the weight to its own last bit
            moved, largest = 0.125 * steps * (steps + 1) / 2, 0.125 * STEPS * (STEPS + 1) / 2 + 2
            assert float((difference - moved).abs().max()) <= (STEPS + 1) * largest * rounding.ROUNDOFF


def test_an_optimizer_that_counts_per_param_group_is_refused(two_ranks: Any) -> None:
    two_ranks.run(refuse_per_group, config=ds_config(grass=cyclic(PERIOD)))


# ---- nothing to sample ----------------------------------------------------------------------------------------------


def run_to_end(config: dict[str, Any], layers: int) -> dict[str, Any]:
    model = tiny_llama(hidden=HIDDEN, layers=layers)
    with engine_of(config, model) as engine:
        start = (engine.grass.phase, engine.grass.active_layers)
        losses = train(engine, 4)
        return {"start": start, "losses": losses, "hash": fingerprint(snapshot(model)), "visits": engine.grass.visits}


@pytest.mark.parametrize(
    ("layers", "gamma", "sampler"),
    tiered([(3, 3, "uniform"), (3, 9, "grass"), (1, 2, "grass"), (1, 1, "cyclic")], (3, 9, "grass"), (1, 1, "cyclic")),
)
def test_as_many_active_layers_as_there_are_is_full_training(
    two_ranks: Any, layers: int, gamma: int, sampler: str
) -> None:
    outside = ["embed", "norm", "head"]
    block = grass_block(sampler=sampler, num_active_layers=gamma, always_active=outside)
    ours = two_ranks.run(run_to_end, config=ds_config(dtype="bf16", grass=block), layers=layers)
    full = two_ranks.run(run_to_end, config=ds_config(dtype="bf16", grass=grass_block(sampler="full")), layers=layers)
    assert ours == full
    assert ours[0]["start"] == ("train", tuple(range(layers)))
    assert ours[0]["visits"] == (4,) * layers
