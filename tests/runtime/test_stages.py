# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 trains what ZeRO-2 trains: the same layers by the same amounts. And both by the gradient of a plain model.

The draws are the same, and so is all arithmetic on reduced gradients. What differs in float32 are the last bits of a rank's own gradient,
before anything is reduced: how a matrix product rounds depends on where its weights lie in memory. Norms are summed in other portions.
Adam divides by the gradient's own size, so those bits grow over steps. Tolerances below state what that amounts to.
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
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
)
from helpers.observed import difference, fp16_allowed, observe
from helpers.tiered import tiered
from torch import nn

from grass_ds.policy.controller import FINGERPRINT_FIELDS

pytestmark = pytest.mark.dist

STEPS, LAYERS = 24, 5


def sampled(sampler: str, **settings: Any) -> dict[str, Any]:
    return grass_block(sampler=sampler, num_active_layers=2, **settings)


@dataclass(frozen=True)
class Case:
    """A run, what may differ of it between the stages, and the offloads that must change no bit of it on ZeRO-3.

    Attributes:
        settings: of :func:`ds_config`; ``zero``: for ZeRO-3 alone.
        loss, weight: largest difference of a loss and of a final weight.
        drift: mean difference of the weights, as part of how far they moved on average.
        norm: largest difference of a step's gradient norm, as part of it.
        offloads: the same bits as without offload.
    """

    settings: dict[str, Any]
    zero: dict[str, Any] = field(default_factory=lambda: RELEASED)
    pool: str = "two_ranks"
    loss: float = 0.0
    weight: float = 0.0
    drift: float = 0.0
    norm: float = 2e-6
    offloads: tuple[dict[str, Any], ...] = ()


def run(config: dict[str, Any], offload: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a run is made of at its end, and per step what it drew and measured; two units per layer."""
    config = copy.deepcopy(config)
    config["grass"]["offload"] = {"nvme_path": str(folder), **offload} if offload["device"] == "nvme" else offload
    model, steps = tiny_llama(layers=LAYERS, bias=True), []
    with fp16_allowed(), engine_of(config, model, model_parameters=split_groups(model)) as engine:
        assert type(engine.optimizer).__name__ == WRAPPERS[engine.zero_optimization_stage()]

        def note(_: int) -> None:
            fingerprint = dict(zip(FINGERPRINT_FIELDS, engine.optimizer.controller.fingerprint(), strict=True))
            drawn = (engine.grass.active_layers, engine.grass.visits, engine.was_step_applied())
            steps.append((drawn, fingerprint, engine.grass.scores, engine.get_global_grad_norm()))

        losses = train(engine, STEPS, after_step=note)
        return {"seen": observe(engine), "steps": steps, "losses": losses}


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """How ZeRO-3 differs from ZeRO-2, and with each offload from ZeRO-3 without."""
    on_device = {"device": "none"}
    two = run(ds_config(**case.settings), on_device, folder)
    config = ds_config(**{**case.settings, "stage": 3, "zero_optimization": case.zero})
    three = run(config, on_device, folder)
    pairs = list(zip(two["steps"], three["steps"], strict=True))
    norms = [(a[-1], b[-1]) for a, b in pairs if math.isfinite(a[-1])]
    start, mine, other = (
        snapshot(tiny_llama(layers=LAYERS, bias=True)),
        three["seen"]["weights"],
        two["seen"]["weights"],
    )
    apart = {name: (weight.float() - mine[name].float()).abs() for name, weight in other.items()}
    moved = {name: (weight.float() - start[name].to(weight.dtype)).abs() for name, weight in other.items()}
    return {
        "draws": [pair for pair in ((a[0], b[0]) for a, b in pairs) if pair[0] != pair[1]],
        "fingerprints": {key for a, b in pairs for key in FINGERPRINT_FIELDS if a[1][key] != b[1][key]},
        "other": {key for key in ("lr", "loss_scale", "steps") if two["seen"][key] != three["seen"][key]},
        "scores": [(a[2], b[2]) for a, b in pairs if a[2] is not None],
        "loss": max(abs(a - b) for a, b in zip(two["losses"], three["losses"], strict=True)),
        "weight": max(float(difference.max()) for difference in apart.values()),
        "drift": sum(float(a.sum()) for a in apart.values()) / sum(float(m.sum()) for m in moved.values()),
        "norm": max(abs(a - b) / a for a, b in norms),
        "offloaded": [difference(three, run(config, offload, folder)) for offload in case.offloads],
        "sets": [drawn[0] for (drawn, *_), _ in pairs],
        "skipped": sum(not drawn[2] for (drawn, *_), _ in pairs),
        "norms": [a for a, _ in norms],
    }


WRAPPERS = {2: "GrassZero12Optimizer", 3: "GrassZero3Optimizer"}
CPU, NVME = {"device": "cpu", "chunk_numel": 1500}, {"device": "nvme", "io": "posix", "chunk_numel": 1024}
STREAM, PERIOD = {"residency": "stream"}, {"residency": "period"}
OUTSIDE = ["embed", "norm", "head"]
CASES: dict[str, Case] = {
    "fp32, every offload": Case(
        {"grass": sampled("grass")},
        loss=2e-6,
        weight=5e-5,
        drift=1e-5,
        offloads=(CPU, {**NVME, **STREAM, "host_buffers": 4}),
    ),
    "bf16, clipping, accumulation, embeddings": Case(
        {"dtype": "bf16", "clip": 0.1, "gas": 2, "grass": sampled("grass", always_active=["embed"])},
        {**RELEASED, "overlap_comm": True},
        loss=3e-3,
        weight=2e-2,
        drift=5e-2,
        norm=2e-2,
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
        loss=5e-6,
        weight=3e-4,
        drift=1e-4,
        norm=1e-5,
        offloads=({**NVME, **PERIOD},),
    ),
    "bf16, clipping, one rank": Case(
        {"dtype": "bf16", "clip": 0.1, "grass": sampled("grass")},
        pool="one_rank",
        loss=3e-3,
        weight=2e-2,
        drift=5e-2,
        norm=2e-2,
    ),
    "clipping, four ranks": Case(
        {"clip": 0.1, "grass": sampled("grass")}, pool="four_ranks", loss=2e-6, weight=5e-5, drift=1e-5
    ),
}


@pytest.mark.parametrize("name", tiered(CASES, *(CASES.keys() - {"clipping, four ranks"})))
def test_zero3_is_zero2(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    case = CASES[name]
    sampler = case.settings["grass"]["sampler"]
    for found in request.getfixturevalue(case.pool).run(compare, timeout=400.0, case=case, folder=tmp_path):
        assert found["draws"] == []
        assert found["fingerprints"] <= {"scores"}  # which are rounded
        assert all(mine == pytest.approx(theirs, rel=10 * case.norm) for theirs, mine in found["scores"])
        assert len(found["scores"]) == (STEPS - 1 if sampler == "grass" else 0)
        assert found["other"] == set()
        assert found["offloaded"] == [None] * len(case.offloads)
        for value in ("loss", "weight", "drift", "norm"):
            assert found[value] <= getattr(case, value), (value, found[value])
        assert len(set(found["sets"])) > 4  # or it did not switch often
        assert found["skipped"] == (2 if sampler == "grass" else 0) or 2 < found["skipped"] < STEPS // 2
        if "clip" in case.settings:
            assert min(found["norms"]) > case.settings["clip"]


# ---- norm and clipping ------------------------------------------------------------------------------------------------------


def follow_plain_gradients(config: dict[str, Any], clip: float, lr: float) -> dict[str, Any]:
    """Plain SGD steps show the clipped gradient itself. Layers per step, largest relative errors of its norm and of the steps."""
    model, plain = tiny_llama(hidden=24), tiny_llama(hidden=24)
    counts, norm_errors, step_errors = [], [0.0], [0.0]
    with engine_of(config, model, optimizer=torch.optim.SGD(model.parameters(), lr=lr)) as engine:
        micros, ranks = range(engine.gradient_accumulation_steps()), range(torch.distributed.get_world_size())
        for step in range(8):
            active, probing, before = engine.grass.active_layers, engine.grass.phase == "probe", snapshot(model)
            plain.load_state_dict(before)
            gradients = plain_gradients(
                plain, active, [batch(step, micro, rank) for micro in micros for rank in ranks]
            )
            norm = norm_of(gradients)
            assert norm > 2 * clip  # or this would not test clipping
            train(engine, 1, start=step)
            moved = {name: weight - before[name] for name, weight in snapshot(model).items()}
            assert {name for name, move in moved.items() if move.any()} == (set() if probing else gradients.keys())
            if not probing:  # probing reports the norm of what it measures: micro-batches one by one
                errors = {name: moved[name] + lr * clip / norm * gradient for name, gradient in gradients.items()}
                step_errors.append(norm_of(errors) / (lr * clip))
                norm_errors.append(abs(engine.get_global_grad_norm() / norm - 1))
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
    del config["optimizer"]
    config["zero_allow_untested_optimizer"] = True
    for found in request.getfixturevalue(pool).run(follow_plain_gradients, config=config, clip=clip, lr=lr):
        assert found["counts"] == [4, 4] + [2] * 6
        assert found["norm"] < 1e-6
        assert found["step"] < 2e-5
