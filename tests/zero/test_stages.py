# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 trains what ZeRO-2 trains: the same layers by the same amounts.

The draws are the same, and so is every bit once the last ones of sums are: see :mod:`helpers.same_arithmetic`. ZeRO-3
goes on here with the norms that ZeRO-2 measured, once its own are found to be the same up to the rounding of sums.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from helpers.models import (
    RELEASED,
    ds_config,
    engine_of,
    grass_block,
    snapshot,
    split_groups,
    tiny_llama,
    train,
)
from helpers.observed import difference, fp16_allowed, observe
from helpers.same_arithmetic import Squares, norms_apart, same_arithmetic
from helpers.tiered import tiered

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
