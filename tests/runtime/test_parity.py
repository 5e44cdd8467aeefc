# SPDX-License-Identifier: Apache-2.0
"""The ``full`` sampler is stock DeepSpeed ZeRO-1/2/3, given the same param groups.

Bit-equal in fp32 without clipping: the same sums in the same order. Elsewhere one thing differs: DeepSpeed sums squared norms per
parameter in float64 and we per shard in float32, so the clip factor differs in its last bits; in bf16 that flips roundings of the
weights. Tolerances below state what that amounts to over as many steps.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from helpers.models import RELEASED, ds_config, engine_of, grass_block, snapshot, tiny_llama, train, unit_groups
from helpers.observed import fp16_allowed
from helpers.tiered import tiered

pytestmark = pytest.mark.dist
STEPS = 10


@dataclass(frozen=True)
class Case:
    """What to run, and how far from stock it may end: the largest difference of a loss and of a weight."""

    settings: dict[str, Any] = field(default_factory=dict)  # of ds_config
    model: dict[str, Any] = field(default_factory=dict)
    reentrant: bool | None = None  # checkpointing mode
    steps: int = STEPS
    loss: float = 0.0
    weight: float = 0.0
    pool: str = "two_ranks"


def zero3(zero: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """ZeRO-3, with ``zero`` over what makes small weights travel like large ones."""
    return {"stage": 3, "zero_optimization": {**RELEASED, **(zero or {})}, **settings}


FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES: dict[str, Case] = {
    "zero2": Case(),
    "zero1": Case({"stage": 1}),
    "zero2-gas4": Case({"gas": 4}),
    "zero1-gas4": Case({"stage": 1, "gas": 4}, loss=1e-6, weight=1e-5),
    "zero2-tied": Case(model={"tied": True}),
    "zero2-overlap": Case({"zero_optimization": {"overlap_comm": True}}),
    "zero2-no-overlap": Case({"zero_optimization": {"overlap_comm": False}}),
    "zero2-reentrant": Case(reentrant=True),
    "zero2-non-reentrant": Case(reentrant=False),
    "zero2-clip": Case({"clip": 0.5}, loss=2e-6, weight=1e-5),
    "zero1-clip-gas4-tied-reentrant": Case(
        {"stage": 1, "clip": 0.5, "gas": 4}, {"tied": True}, True, loss=5e-6, weight=2e-5
    ),
    "zero2-bf16": Case({"dtype": "bf16"}),
    "zero1-bf16": Case({"dtype": "bf16", "stage": 1}),
    "zero2-bf16-clip-gas4": Case({"dtype": "bf16", "clip": 1.0, "gas": 4}, loss=5e-3, weight=2e-2),
    "zero1-bf16-fp32-accumulation": Case(
        {"dtype": "bf16", "stage": 1, "gas": 4, **FP32_ACCUMULATION}, loss=5e-3, weight=2e-2
    ),
    "zero2-fp16-clip": Case({"dtype": "fp16", "clip": 1.0}, loss=1e-3, weight=5e-3),
    "zero2-fp16-overflow": Case(
        {"dtype": "fp16", "fp16": {"initial_scale_power": 26, "hysteresis": 1}}, loss=1e-4, weight=1e-3
    ),
    "zero3": Case(zero3()),
    "zero3-gas4-persistent": Case({"stage": 3, "gas": 4}, steps=5),
    "zero3-tied-overlap": Case(zero3({"overlap_comm": True}), {"tied": True}),
    "zero3-no-overlap-some-persistent": Case(
        zero3({"overlap_comm": False, "stage3_param_persistence_threshold": 1100})
    ),
    "zero3-reentrant": Case(zero3(), reentrant=True),
    "zero3-non-reentrant": Case(zero3(), reentrant=False),
    "zero3-clip": Case(zero3(clip=0.5), loss=2e-6, weight=1e-5),
    "zero3-clip-gas4-tied-reentrant": Case(zero3(clip=0.5, gas=4), {"tied": True}, True, 5, loss=5e-6, weight=2e-5),
    "zero3-bf16-padding": Case(zero3(dtype="bf16"), {"bias": True}),
    "zero3-bf16-clip-gas4": Case(zero3(dtype="bf16", clip=1.0, gas=4), steps=5, loss=5e-3, weight=2e-2),
    "zero3-bf16-fp32-accumulation": Case(zero3(dtype="bf16", gas=4, **FP32_ACCUMULATION), steps=5),
    "zero3-fp16-clip": Case(zero3(dtype="fp16", clip=1.0), loss=1e-3, weight=5e-3),
    "zero3-fp16-overflow": Case(zero3(dtype="fp16", fp16={"initial_scale_power": 20, "hysteresis": 1})),
    "zero3-one-rank": Case(zero3(dtype="bf16", gas=2), pool="one_rank"),
    "zero3-four-ranks-padding": Case(zero3(), {"bias": True}, pool="four_ranks"),
}
WRAPPERS = {
    1: ({"DeepSpeedZeroOptimizer", "BF16_Optimizer"}, "GrassZero12Optimizer"),
    2: ({"DeepSpeedZeroOptimizer"}, "GrassZero12Optimizer"),
    3: ({"DeepSpeedZeroOptimizer_Stage3"}, "GrassZero3Optimizer"),
}


def run(config: dict[str, Any], model_arguments: dict[str, Any], reentrant: bool | None, steps: int) -> dict[str, Any]:
    with fp16_allowed():
        model = tiny_llama(**model_arguments)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        with engine_of(config, model, model_parameters=unit_groups(model)) as engine:
            losses = train(engine, steps)
            wrapper = type(engine.optimizer).__name__
            return {"losses": losses, "weights": snapshot(model), "skipped": engine.skipped_steps, "wrapper": wrapper}


# Only with --all: each thing in them is in another case as well, if at another stage or number of ranks.
COSTLY = {
    "zero2-fp16-clip",
    "zero3-no-overlap-some-persistent",
    "zero3-non-reentrant",
    "zero3-reentrant",
    "zero3-clip",
    "zero3-bf16-clip-gas4",
    "zero3-bf16-fp32-accumulation",
    "zero3-fp16-clip",
    "zero3-four-ranks-padding",
}


@pytest.mark.parametrize("name", tiered(CASES, *(CASES.keys() - COSTLY)))
def test_full_sampler_is_stock_deepspeed(request: pytest.FixtureRequest, name: str) -> None:
    case = CASES[name]
    pool = request.getfixturevalue(case.pool)
    arguments = {"model_arguments": case.model, "reentrant": case.reentrant, "steps": case.steps}
    stock = pool.run(run, config=ds_config(**case.settings), **arguments)
    ours = pool.run(run, config=ds_config(**case.settings, grass=grass_block(sampler="full")), **arguments)
    wrappers, wrapper = WRAPPERS[case.settings.get("stage", 2)]
    for theirs, mine in zip(stock, ours, strict=True):
        assert theirs["wrapper"] in wrappers
        assert mine["wrapper"] == wrapper
        assert mine["skipped"] == theirs["skipped"]
        assert max(abs(a - b) for a, b in zip(theirs["losses"], mine["losses"], strict=True)) <= case.loss
        assert max(float((w - mine["weights"][n]).abs().max()) for n, w in theirs["weights"].items()) <= case.weight
    moved = tiny_llama(**case.model).state_dict()
    assert any(not torch.equal(w.float(), moved[n].to(w.dtype).float()) for n, w in ours[0]["weights"].items())
    if "overflow" in name:
        assert 0 < ours[0]["skipped"] < STEPS
