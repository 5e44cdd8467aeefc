# SPDX-License-Identifier: Apache-2.0
"""The ``full`` sampler is stock DeepSpeed ZeRO-1/2/3, given the same param groups: bit by bit, on every CPU.

Both sum the same gradients in the same order. One thing differs: DeepSpeed sums squared norms per parameter in float64
and we per shard in float32, so the two norms, and with them the factor that clips, differ in their last bits. So stock
clips here by the norm that our run measured. Then all weights must be equal, so both runs have the same gradients at
every step, and the norm that stock itself measured of them must be ours up to the rounding of the sums.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from helpers import rounding
from helpers.models import RELEASED, ds_config, engine_of, grass_block, snapshot, tiny_llama, train, unit_groups
from helpers.observed import difference, fp16_allowed
from helpers.tiered import tiered
from torch import nn

pytestmark = pytest.mark.dist
STEPS = 5


@dataclass(frozen=True)
class Case:
    """What to run.

    Attributes:
        settings: of :func:`ds_config`; ``model``: of :func:`tiny_llama`.
        reentrant: checkpointing mode, None without checkpointing.
        stock: the case whose stock run this one is compared with, where it computes the same; by default its own.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    reentrant: bool | None = None
    steps: int = STEPS
    pool: str = "two_ranks"
    stock: str | None = None


def zero3(zero: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """ZeRO-3, with ``zero`` over what makes small weights travel like large ones."""
    return {"stage": 3, "zero_optimization": {**RELEASED, **(zero or {})}, **settings}


FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
OVERFLOW2, OVERFLOW3 = ({"initial_scale_power": power, "hysteresis": 1} for power in (26, 20))
CASES: dict[str, Case] = {
    "zero2": Case(),
    "zero1": Case({"stage": 1}, stock="zero2"),
    "zero1-gas4": Case({"stage": 1, "gas": 4}),
    "zero2-overlap": Case({"zero_optimization": {"overlap_comm": True}}, stock="zero2"),
    "zero2-no-overlap": Case({"zero_optimization": {"overlap_comm": False}}, stock="zero2"),
    "zero2-reentrant": Case(reentrant=True, stock="zero2"),
    "zero2-non-reentrant": Case(reentrant=False, stock="zero2"),
    "zero2-clip-gas4-tied": Case({"clip": 0.5, "gas": 4}, {"tied": True}),
    "zero1-clip-gas4-tied-reentrant": Case({"stage": 1, "clip": 0.5, "gas": 4}, {"tied": True}, True),
    "zero2-bf16": Case({"dtype": "bf16"}),
    "zero1-bf16": Case({"dtype": "bf16", "stage": 1}, stock="zero2-bf16"),
    "zero2-bf16-clip-gas4": Case({"dtype": "bf16", "clip": 0.5, "gas": 4}),
    "zero1-bf16-fp32-accumulation": Case({"dtype": "bf16", "stage": 1, "gas": 4, **FP32_ACCUMULATION}),
    "zero2-fp16-clip-overflow": Case({"dtype": "fp16", "clip": 1.0, "fp16": OVERFLOW2}, steps=10),
    "zero3": Case(zero3()),
    "zero3-gas4-persistent": Case({"stage": 3, "gas": 4}),
    "zero3-tied-overlap": Case(zero3({"overlap_comm": True}), {"tied": True}),
    "zero3-no-overlap-some-persistent": Case(
        zero3({"overlap_comm": False, "stage3_param_persistence_threshold": 1100})
    ),
    "zero3-reentrant": Case(zero3(), reentrant=True, stock="zero3"),
    "zero3-non-reentrant": Case(zero3(), reentrant=False, stock="zero3"),
    "zero3-clip-gas4-tied-reentrant": Case(zero3(clip=0.5, gas=4), {"tied": True}, True),
    "zero3-bf16-padding": Case(zero3(dtype="bf16"), {"bias": True}),
    "zero3-bf16-clip-fp32-accumulation": Case(zero3(dtype="bf16", clip=0.5, gas=4, **FP32_ACCUMULATION)),
    "zero3-fp16-clip-overflow": Case(zero3(dtype="fp16", clip=1.0, fp16=OVERFLOW3)),
    "zero3-one-rank": Case(zero3(dtype="bf16", gas=2), pool="one_rank"),
    "zero3-four-ranks-padding": Case(zero3(), {"bias": True}, pool="four_ranks"),
}
WRAPPERS = {
    1: ({"DeepSpeedZeroOptimizer", "BF16_Optimizer"}, "GrassZero12Optimizer"),
    2: ({"DeepSpeedZeroOptimizer"}, "GrassZero12Optimizer"),
    3: ({"DeepSpeedZeroOptimizer_Stage3"}, "GrassZero3Optimizer"),
}


@contextmanager
def clipping_by(norms: Sequence[float]) -> Iterator[list[float]]:
    """Stock clips by these norms, loss scale included, one per applied step. Yields the norms that it measured."""
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    given, measured = iter(norms), []

    def replaced(measure: Any) -> Any:
        def norm(*args: Any, **kwargs: Any) -> torch.Tensor:
            measured.append(float(measure(*args, **kwargs)))
            return torch.tensor(next(given), dtype=torch.float64)  # as ours: python computes the factor in float64

        return norm

    with ExitStack() as patches:
        for module, name in (
            (stage_1_and_2, "combine_grad_norm_groups"),
            (stage3, "combine_grad_norm_groups"),
            (bf16_optimizer, "get_global_norm_of_tensors"),
        ):
            patches.enter_context(mock.patch.object(module, name, replaced(getattr(module, name))))
        yield measured


def run(case: Case, grass: dict[str, Any], norms: Sequence[float] = ()) -> dict[str, Any]:
    """Our run or, without a block, stock's, which clips by ``norms``."""
    with fp16_allowed(), clipping_by(norms) as measured:
        model = tiny_llama(**case.model)
        if case.reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": case.reentrant})
            model.train()
        with engine_of(ds_config(**case.settings, **grass), model, model_parameters=unit_groups(model)) as engine:

            def measure(_: int) -> None:
                if grass and engine.was_step_applied():
                    assert engine.get_global_grad_norm() > engine.gradient_clipping()  # or nothing would be clipped
                    measured.append(engine.get_global_grad_norm() * engine.optimizer.loss_scale)

            losses = train(engine, case.steps, after_step=measure)
            return {
                "wrapper": type(engine.optimizer).__name__,
                "skipped": engine.skipped_steps,
                "losses": losses,
                "weights": snapshot(model),
                "norms": measured,
            }


def rounding_of_norms(model: nn.Module, world: int) -> float:
    """How far two correct norms of one gradient may be apart, as part of them.

    Ours is a float32 sum over each unit's shard. Stock's, after sums in float64, rounds to float32, sums over ranks,
    takes a root and a square, sums over the groups and takes a root. A rank, a layer or a projection left out changes
    the norm by far more.
    """
    units = [sum(param.numel() for param in group["params"]) for group in unit_groups(model)]
    stock = (world + len(units) + 4) * rounding.ROUNDOFF
    return rounding.of_norm(max(units) // world + 1, world, micro_steps=2) + stock


@pytest.fixture(scope="module")
def stock_runs() -> dict[str, list[dict[str, Any]]]:
    """What stock made of a case, by rank."""
    return {}


# Only with --all: each thing in them is in another case as well, if at another stage or number of ranks.
COSTLY = {
    "zero3-no-overlap-some-persistent",
    "zero3-non-reentrant",
    "zero3-reentrant",
    "zero3-bf16-clip-fp32-accumulation",
    "zero3-fp16-clip-overflow",
    "zero3-four-ranks-padding",
}
assert CASES.keys() >= COSTLY


@pytest.mark.parametrize("name", tiered(CASES, *(CASES.keys() - COSTLY)))
def test_full_sampler_is_stock_deepspeed(
    request: pytest.FixtureRequest, stock_runs: dict[str, list[dict[str, Any]]], name: str
) -> None:
    case = CASES[name]
    pool, stock_name = request.getfixturevalue(case.pool), case.stock or name
    ours = pool.run(run, case=case, grass={"grass": grass_block(sampler="full")})
    assert all(mine["norms"] == ours[0]["norms"] for mine in ours)
    if stock_name not in stock_runs:
        stock_runs[stock_name] = pool.run(run, case=CASES[stock_name], grass={}, norms=ours[0]["norms"])
    model = tiny_llama(**case.model)
    start, largest = model.state_dict(), rounding_of_norms(model, pool.world)
    wrappers, wrapper = WRAPPERS[case.settings.get("stage", 2)]
    for theirs, mine in zip(stock_runs[stock_name], ours, strict=True):
        assert theirs["wrapper"] in wrappers
        assert mine["wrapper"] == wrapper
        compared = ("skipped", "losses", "weights")
        assert difference({key: theirs[key] for key in compared}, {key: mine[key] for key in compared}) is None
        assert len(mine["norms"]) == case.steps - mine["skipped"]
        assert mine["norms"] == pytest.approx(theirs["norms"], rel=largest, abs=0.0)
        assert 0 < mine["skipped"] < case.steps if "overflow" in name else mine["skipped"] == 0
    assert any(not torch.equal(w.float(), start[n].to(w.dtype).float()) for n, w in ours[0]["weights"].items())
