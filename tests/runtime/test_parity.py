# SPDX-License-Identifier: Apache-2.0
"""The ``full`` sampler is stock DeepSpeed ZeRO-1/2, given the same param groups.

Bit-equal in fp32 without clipping: the same sums in the same order. Elsewhere one thing differs: DeepSpeed sums squared norms per
parameter in float64 and we per shard in float32, so the clip factor differs in its last bits; in bf16 that flips roundings of the
weights. Tolerances below state what that amounts to over 10 steps.
"""

from typing import Any

import pytest
import torch
from helpers.models import ds_config, engine_of, grass_block, snapshot, tiny_llama, train, unit_groups

pytestmark = pytest.mark.dist
STEPS = 10

# name -> (ds_config arguments, model arguments, checkpointing mode, largest difference of a loss, of a weight)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], bool | None, float, float]] = {
    "zero2": ({}, {}, None, 0.0, 0.0),
    "zero1": ({"stage": 1}, {}, None, 0.0, 0.0),
    "zero2-gas4": ({"gas": 4}, {}, None, 0.0, 0.0),
    "zero1-gas4": ({"stage": 1, "gas": 4}, {}, None, 1e-6, 1e-5),
    "zero2-tied": ({}, {"tied": True}, None, 0.0, 0.0),
    "zero2-overlap": ({"zero_optimization": {"overlap_comm": True}}, {}, None, 0.0, 0.0),
    "zero2-no-overlap": ({"zero_optimization": {"overlap_comm": False}}, {}, None, 0.0, 0.0),
    "zero2-reentrant": ({}, {}, True, 0.0, 0.0),
    "zero2-non-reentrant": ({}, {}, False, 0.0, 0.0),
    "zero2-clip": ({"clip": 0.5}, {}, None, 2e-6, 1e-5),
    "zero1-clip-gas4-tied-reentrant": ({"stage": 1, "clip": 0.5, "gas": 4}, {"tied": True}, True, 5e-6, 2e-5),
    "zero2-bf16": ({"dtype": "bf16"}, {}, None, 0.0, 0.0),
    "zero1-bf16": ({"dtype": "bf16", "stage": 1}, {}, None, 0.0, 0.0),
    "zero2-bf16-clip-gas4": ({"dtype": "bf16", "clip": 1.0, "gas": 4}, {}, None, 5e-3, 2e-2),
    "zero1-bf16-fp32-accumulation": (
        {"dtype": "bf16", "stage": 1, "gas": 4, "data_types": {"grad_accum_dtype": "fp32"}},
        {},
        None,
        5e-3,
        2e-2,
    ),
    "zero2-fp16-clip": ({"dtype": "fp16", "clip": 1.0}, {}, None, 1e-3, 5e-3),
    "zero2-fp16-overflow": (
        {"dtype": "fp16", "fp16": {"initial_scale_power": 26, "hysteresis": 1}},
        {},
        None,
        1e-4,
        1e-3,
    ),
}


def run(config: dict[str, Any], model_arguments: dict[str, Any], reentrant: bool | None) -> dict[str, Any]:
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    had = accelerator.is_fp16_supported
    accelerator.is_fp16_supported = lambda: True  # gloo and the CPU kernels can; DeepSpeed's CPU accelerator says no
    try:
        model = tiny_llama(**model_arguments)
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.train()
        with engine_of(config, model, model_parameters=unit_groups(model)) as engine:
            losses = train(engine, STEPS)
            wrapper = type(engine.optimizer).__name__
            return {"losses": losses, "weights": snapshot(model), "skipped": engine.skipped_steps, "wrapper": wrapper}
    finally:
        accelerator.is_fp16_supported = had


@pytest.mark.parametrize("case", CASES)
def test_full_sampler_is_stock_deepspeed(two_ranks: Any, case: str) -> None:
    settings, model_arguments, reentrant, loss_tolerance, weight_tolerance = CASES[case]
    stock = two_ranks.run(run, config=ds_config(**settings), model_arguments=model_arguments, reentrant=reentrant)
    block = {"grass": grass_block(sampler="full")}
    ours = two_ranks.run(
        run, config=ds_config(**settings, **block), model_arguments=model_arguments, reentrant=reentrant
    )
    for theirs, mine in zip(stock, ours, strict=True):
        assert theirs["wrapper"] in ("DeepSpeedZeroOptimizer", "BF16_Optimizer")
        assert mine["wrapper"] == "GrassZero12Optimizer"
        assert mine["skipped"] == theirs["skipped"]
        assert max(abs(a - b) for a, b in zip(theirs["losses"], mine["losses"], strict=True)) <= loss_tolerance
        difference = max(float((w - mine["weights"][n]).abs().max()) for n, w in theirs["weights"].items())
        assert difference <= weight_tolerance
    moved = tiny_llama(**model_arguments).state_dict()
    assert any(not torch.equal(w.float(), moved[n].to(w.dtype).float()) for n, w in ours[0]["weights"].items())
    if case == "zero2-fp16-overflow":
        assert 0 < ours[0]["skipped"] < STEPS
