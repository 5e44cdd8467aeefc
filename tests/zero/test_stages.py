# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 trains what ZeRO-2 trains: the same layers by the same amounts. And both by the gradient of a plain model.

The draws are the same, and so is every bit once the last ones of sums are: see :mod:`helpers.same_arithmetic`. ZeRO-3
goes on here with the norms that ZeRO-2 measured, once its own are found to be the same up to the rounding of sums.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from helpers import rounding
from helpers.models import (
    RELEASED,
    batch,
    ds_config,
    engine_of,
    grass_block,
    snapshot,
    split_groups,
    tiny_llama,
    train,
    without_optimizer,
)
from helpers.observed import difference, fp16_allowed, observe
from helpers.same_arithmetic import Squares, norms_apart, same_arithmetic
from helpers.tiered import tiered
from torch import nn

pytestmark = pytest.mark.dist

STEPS, LAYERS = 21, 5


def sampled(sampler: str, **settings: Any) -> dict[str, Any]:
    return grass_block(sampler=sampler, num_active_layers=2, **settings)


@dataclass(frozen=True)
class Case:
    """A run of both stages, and the offloads that must change no bit of it on ZeRO-3.

    Attributes:
        settings: of :func:`ds_config`; ``zero``: for ZeRO-3 alone.
    """

    settings: dict[str, Any]
    zero: dict[str, Any] = field(default_factory=lambda: RELEASED)
    pool: str = "two_ranks"
    offloads: tuple[dict[str, Any], ...] = ()


def run(
    config: dict[str, Any], offload: dict[str, Any], folder: Path, given: Sequence[Squares] | None = None
) -> dict[str, Any]:
    """What a run is made of at its end, and per step what it drew and measured; two units per layer."""
    config = copy.deepcopy(config)
    config["grass"]["offload"] = {"nvme_path": str(folder), **offload} if offload["device"] == "nvme" else offload
    model, steps = tiny_llama(layers=LAYERS, bias=True), []
    with (
        fp16_allowed(),
        same_arithmetic(given) as measured,
        engine_of(config, model, model_parameters=split_groups(model)) as engine,
    ):
        assert type(engine.optimizer).__name__ == WRAPPERS[engine.zero_optimization_stage()]

        def observe_step(_: int) -> None:
            drawn = (engine.grass.active_layers, engine.grass.visits, engine.was_step_applied())
            fingerprint = engine.optimizer.controller.fingerprint()
            steps.append((drawn, fingerprint, engine.grass.scores, engine.get_global_grad_norm()))

        losses = train(engine, STEPS, after_step=observe_step)
        seen = observe(engine)
        return {
            "steps": steps,
            "losses": losses,
            "end": {key: value for key, value in seen.items() if key != "state"},
            "masters": {name: safe_get_full_fp32_param(param) for name, param in model.named_parameters()},
            "state": seen["state"],  # of this rank's shard, which is another in every stage
            "measured": measured,
            "shards": {unit.name: unit.shard_numel for unit in engine.optimizer.units},
        }


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """How ZeRO-3 differs from ZeRO-2, and with each offload from ZeRO-3 without."""
    on_device = {"device": "none"}
    two = run(ds_config(**case.settings), on_device, folder)
    config = ds_config(**{**case.settings, "stage": 3, "zero_optimization": case.zero})
    three = run(config, on_device, folder, two["measured"])
    start = snapshot(tiny_llama(layers=LAYERS, bias=True))
    return {
        "differences": [difference(two[key], three[key], key) for key in ("steps", "losses", "end", "masters")],
        "apart": norms_apart(two, three),
        "offloaded": [difference(three, run(config, offload, folder, two["measured"])) for offload in case.offloads],
        "moved": sum(not torch.equal(start[name], master) for name, master in two["masters"].items()),
        "scores": sum(scores is not None for _, _, scores, _ in two["steps"]),
        "sets": [drawn[0] for drawn, *_ in two["steps"]],
        "skipped": sum(not drawn[2] for drawn, *_ in two["steps"]),
        "norms": [step[-1] for step in two["steps"]],
    }


WRAPPERS = {2: "GrassZero12Optimizer", 3: "GrassZero3Optimizer"}
CPU, NVME = {"device": "cpu", "chunk_numel": 1500}, {"device": "nvme", "io": "posix", "chunk_numel": 1024}
STREAM, PERIOD = {"residency": "stream"}, {"residency": "period"}
OUTSIDE = ["embed", "norm", "head"]
CASES: dict[str, Case] = {
    "fp32, every offload": Case(
        {"grass": sampled("grass")},
        offloads=(CPU, {**NVME, **STREAM, "host_buffers": 4}),
    ),
    "bf16, clipping, accumulation, embeddings": Case(
        {"dtype": "bf16", "clip": 0.1, "gas": 2, "grass": sampled("grass", always_active=["embed"])},
        {**RELEASED, "overlap_comm": True},
        offloads=(CPU,),
    ),
    "fp16, skipped steps, all but the layers always": Case(
        {
            "dtype": "fp16",
            "fp16": {"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3},
            "grass": sampled("uniform", always_active=OUTSIDE),
        },
        {},
        offloads=({**CPU, **PERIOD},),
    ),
    "clipping, only layers, state reset": Case(
        {"clip": 0.1, "grass": sampled("cyclic", always_active=[], state_on_switch="reset")},
        {"stage3_param_persistence_threshold": 1100},  # of every layer's parameters some
        offloads=({**NVME, **PERIOD},),
    ),
    "bf16, clipping, one rank": Case(
        {"dtype": "bf16", "clip": 0.1, "grass": sampled("grass")},
        pool="one_rank",
    ),
    "clipping, four ranks": Case({"clip": 0.1, "grass": sampled("grass")}, pool="four_ranks"),
}


@pytest.mark.parametrize("name", tiered(CASES, *(CASES.keys() - {"clipping, four ranks"})))
def test_zero3_is_zero2(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    sampler = case.settings["grass"]["sampler"]
    for found in request.getfixturevalue(case.pool).run(compare, timeout=400.0, case=case, folder=tmp_path):
        assert found["differences"] == [None] * 4
        assert found["apart"] == []
        assert found["offloaded"] == [None] * len(case.offloads)
        assert found["moved"] > 10
        assert found["scores"] == (STEPS - 1 if sampler == "grass" else 0)
        assert len(set(found["sets"])) > 4  # or it did not switch often
        assert found["skipped"] == (2 if sampler == "grass" else 0) or 2 < found["skipped"] < STEPS // 2
        if "clip" in case.settings:
            assert min(found["norms"]) > case.settings["clip"]


# ---- norm and clipping ----------------------------------------------------------------------------------------------


def follow_plain_gradients(config: dict[str, Any], clip: float, lr: float) -> dict[str, Any]:
    """Plain SGD steps show the clipped gradient itself. Layers per step; relative errors of its norm and of the steps
    over what they may be.

    The truth is a float64 model's gradient. What a float32 model of the same weights is off by is the noise of this
    CPU. A norm can be off by no more than its gradient, and by the rounding of its sum; a step, besides, by the
    rounding of the weights that it is added to.
    """
    model, plain = tiny_llama(hidden=24), tiny_llama(hidden=24)
    exact = rounding.wide(plain)
    counts, norm_errors, step_errors = [], [0.0], [0.0]
    numel = sum(param.numel() for param in plain.model.layers[0].parameters())
    with engine_of(config, model, optimizer=torch.optim.SGD(model.parameters(), lr=lr)) as engine:
        micros, ranks = range(engine.gradient_accumulation_steps()), range(torch.distributed.get_world_size())
        of_sum = rounding.of_norm(numel, len(ranks))
        for step in range(8):
            active, probing, before = engine.grass.active_layers, engine.grass.phase == "probe", snapshot(model)
            rows = [batch(step, micro, rank) for micro in micros for rank in ranks]
            for reference in (plain, exact):
                reference.load_state_dict(before)
            gradients, narrow = plain_gradients(exact, active, rows), plain_gradients(plain, active, rows)
            norm = norm_of(gradients)
            noise = rounding.DRAWS * norm_of({name: narrow[name] - g for name, g in gradients.items()}) / norm
            assert norm > 2 * clip  # or this would not test clipping
            train(engine, 1, start=step)
            moved = {name: weight - before[name] for name, weight in snapshot(model).items()}
            assert {name for name, move in moved.items() if move.any()} == (set() if probing else gradients.keys())
            if not probing:  # probing reports the norm of what it measures: micro-batches one by one
                errors = {name: moved[name] + lr * clip / norm * gradient for name, gradient in gradients.items()}
                of_weights = rounding.ROUNDOFF * norm_of({n: before[n].abs() + moved[n].abs() for n in gradients})
                step_errors.append(norm_of(errors) / (lr * clip) / (2 * noise + of_sum + of_weights / (lr * clip)))
                norm_errors.append(abs(engine.get_global_grad_norm() / norm - 1) / (noise + of_sum))
            counts.append(len(active))
    return {"counts": counts, "norm": max(norm_errors), "step": max(step_errors)}


def plain_gradients(plain: nn.Module, layers: tuple[int, ...], rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradient of the mean loss of several batches, of the layers and the final norm."""
    prefixes = ("model.norm.", *(f"model.layers.{layer}." for layer in layers))
    named = {name: param for name, param in plain.named_parameters() if name.startswith(prefixes)}
    loss = torch.stack([plain(input_ids=ids, labels=ids).loss for ids in rows]).mean()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


@pytest.mark.parametrize(("pool", "gas"), [("two_ranks", 3), ("four_ranks", 1)])
def test_norm_and_clipping_are_those_of_the_whole_gradient_of_the_active_layers(
    request: pytest.FixtureRequest, pool: str, gas: int
) -> None:
    clip, lr = 0.05, 10.0
    config = ds_config(stage=3, gas=gas, clip=clip, grass=sampled("grass"), zero_optimization=RELEASED)
    arguments = {"config": without_optimizer(config), "clip": clip, "lr": lr}
    for found in request.getfixturevalue(pool).run(follow_plain_gradients, **arguments):
        assert found["counts"] == [4, 4] + [2] * 6
        assert found["norm"] <= 1
        assert found["step"] <= 1
