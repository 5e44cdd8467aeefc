# SPDX-License-Identifier: Apache-2.0
"""Learning-rate schedules are stock DeepSpeed's, step for step, whoever builds the scheduler and whenever.

Probing steps update nothing, so the schedule waits for them and is then the same.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from helpers.models import ds_config, engine_of, grass_block, tiny_llama, train, without_optimizer
from helpers.tiered import tiered

pytestmark = pytest.mark.dist
STEPS, PROBE_STEPS = 12, 2
LRS = (1e-3, 2e-4)


def decay(step: int) -> float:
    return 0.9**step


def built_before(optimizer: torch.optim.Optimizer) -> Any:
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, decay)}


def built_by_the_engine(optimizer: torch.optim.Optimizer) -> Any:
    return {"optimizer": optimizer, "lr_scheduler": lambda client: torch.optim.lr_scheduler.LambdaLR(client, decay)}


def from_transformers(optimizer: torch.optim.Optimizer) -> Any:
    from transformers import get_scheduler

    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=STEPS)
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def from_config(optimizer: torch.optim.Optimizer) -> Any:
    return {"optimizer": optimizer}


WARMUP = {"warmup_num_steps": 3, "total_num_steps": STEPS}
# name -> (arguments of initialize, "scheduler" of the DeepSpeed config)
SCHEDULERS: dict[str, tuple[Callable[[torch.optim.Optimizer], Any], dict[str, Any] | None]] = {
    "WarmupDecayLR": (
        from_config,
        {"type": "WarmupDecayLR", "params": {**WARMUP, "warmup_max_lr": list(LRS), "warmup_min_lr": [0.0, 0.0]}},
    ),
    "WarmupCosineLR": (from_config, {"type": "WarmupCosineLR", "params": {**WARMUP, "cos_min_ratio": 0.1}}),
    "torch object built before": (built_before, None),
    "callable": (built_by_the_engine, None),
    "transformers": (from_transformers, None),
}


def two_groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Decay and no-decay groups, as Hugging Face makes them, at different learning rates."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "lr": LRS[0], "weight_decay": 0.1},
        {"params": vectors, "lr": LRS[1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups)


def rates(config: dict[str, Any], name: str, steps: int) -> dict[str, Any]:
    """Learning rates per client group before every step, what the engine reports, and the layers trained."""
    arguments, scheduler = SCHEDULERS[name]
    model = tiny_llama()
    config = without_optimizer(config)
    if scheduler is not None:
        config["scheduler"] = scheduler
    with engine_of(config, model, **arguments(two_groups(model))) as engine:
        found: dict[str, Any] = {"groups": [], "engine": [], "active": set()}

        def observe(step: int) -> None:
            found["groups"].append([group["lr"] for group in engine.optimizer.param_groups])
            found["engine"].append(list(engine.get_lr()))
            if engine.grass is not None:
                found["active"].add(engine.grass.active_layers)

        observe(-1)
        train(engine, steps, after_step=observe)
        return found


@pytest.fixture(scope="module")
def stock_rates(two_ranks: Any) -> Callable[[str], dict[str, Any]]:
    """Stock DeepSpeed's rates with a scheduler, on rank 0; one run per scheduler."""
    return cache(lambda name: two_ranks.run(rates, config=ds_config(), name=name, steps=STEPS)[0])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_lr_sequence_is_stock_deepspeeds(two_ranks: Any, stock_rates: Callable[[str], Any], name: str) -> None:
    stock = stock_rates(name)
    [ours, other_rank] = two_ranks.run(
        rates, config=ds_config(grass=grass_block(sampler="uniform")), name=name, steps=STEPS
    )
    assert len({tuple(lrs) for lrs in stock["groups"]}) > STEPS // 2  # a schedule that stands still would show nothing
    assert sum(first != second for first, second in stock["groups"]) > STEPS // 2
    assert len(ours["active"]) > 1  # layers were switched on the way
    assert ours["groups"] == stock["groups"] == other_rank["groups"]
    assert ours["engine"] == stock["engine"]


@pytest.mark.parametrize(
    ("sampler", "name"),
    tiered(
        [*(("grass", name) for name in SCHEDULERS), ("outlier", "WarmupDecayLR")],
        ("grass", "torch object built before"),
        ("outlier", "WarmupDecayLR"),
    ),
)
def test_probing_delays_the_schedule_by_its_steps(
    two_ranks: Any, stock_rates: Callable[[str], Any], sampler: str, name: str
) -> None:
    stock = stock_rates(name)
    block = grass_block(sampler=sampler, probe_steps=PROBE_STEPS, outlier_threshold=3.0)
    [ours, _] = two_ranks.run(rates, config=ds_config(stage=1, grass=block), name=name, steps=STEPS + PROBE_STEPS)
    assert ours["groups"] == [stock["groups"][0]] * PROBE_STEPS + stock["groups"]


def hand_driven(config: dict[str, Any], steps: int) -> list[float]:
    """A scheduler that the engine does not know, built on the client optimizer after initialize."""
    model = tiny_llama()
    config = without_optimizer(config)
    client = two_groups(model)
    with engine_of(config, model, optimizer=client) as engine:
        scheduler = torch.optim.lr_scheduler.LambdaLR(client, decay)
        found = [scheduler.get_last_lr()[0]]

        def advance(step: int) -> None:
            if engine.was_step_applied():
                scheduler.step()
            found.append(engine.get_lr()[0])

        train(engine, steps, after_step=advance)
        return found


def test_scheduler_built_after_initialize(two_ranks: Any) -> None:
    block = grass_block(sampler="static", probe_steps=PROBE_STEPS)
    [found, _] = two_ranks.run(hand_driven, config=ds_config(grass=block), steps=STEPS)
    expected = [LRS[0] * decay(max(step - PROBE_STEPS, 0)) for step in range(STEPS + 1)]
    assert found == pytest.approx(expected, rel=1e-12)
