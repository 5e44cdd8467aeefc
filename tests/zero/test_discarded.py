# SPDX-License-Identifier: Apache-2.0
"""``zero_grad()`` discards the accumulation window: the run continues bit by bit as if it had not seen the batch."""

from collections.abc import Sequence
from typing import Any

import pytest
from helpers.models import RELEASED, backward, ds_config, engine_of, grass_block, loss_of, snapshot
from helpers.observed import difference
from helpers.tiered import tiered

from grass_ds.core.agreement import RankDivergenceError

pytestmark = pytest.mark.dist
STEPS = 5


def discarding(
    config: dict[str, Any], bad: Sequence[tuple[int, int]], how: str = "engine", lost: bool = False
) -> dict[str, Any]:
    """Train; before the micro-steps of ``bad`` comes a batch whose gradient is thrown away.

    Args:
        how: whose ``zero_grad()`` is called: ``engine`` or ``optimizer``; with ``always`` also before every window, as
            Trainer does.
        lost: do not discard, but give the micro-steps before those of ``bad`` in their window a loss of 0, which has
            the same effect.
    """
    with engine_of(config) as engine:
        for step in range(STEPS):
            for micro in range(engine.gradient_accumulation_steps()):
                if how == "always" and micro == 0:
                    engine.zero_grad()
                    engine.optimizer.zero_grad()
                if (step, micro) in bad and not lost:
                    engine.backward(100.0 * loss_of(engine, step, 50 + micro))
                    (engine.optimizer if how == "optimizer" else engine).zero_grad()
                zeroed = lost and any(step == at and micro < until for at, until in bad)
                engine.backward((0.0 if zeroed else 1.0) * loss_of(engine, step, micro))
                engine.step()
        return {"weights": snapshot(engine.module), "grass": engine.optimizer.controller.state_dict()}


FULL, PROBING = {"sampler": "full"}, grass_block(sampler="grass")
SETTINGS = {
    "zero2": (ds_config(grass=FULL, clip=1.0), "engine"),
    "zero1-probing": (ds_config(stage=1, gas=2, grass=PROBING), "engine"),
    "zero2-probing": (ds_config(gas=2, grass=PROBING), "optimizer"),
    "zero3-probing": (ds_config(stage=3, gas=2, grass=PROBING, zero_optimization=RELEASED), "engine"),
    "zero2-overlap": (ds_config(gas=2, grass=PROBING, zero_optimization={"overlap_comm": True}), "engine"),
    "zero2-before-every-window": (ds_config(gas=2, grass=PROBING), "always"),
}


@pytest.mark.parametrize(
    "name", tiered(SETTINGS, "zero2", "zero1-probing", "zero3-probing", "zero2-before-every-window")
)
def test_a_batch_that_is_thrown_away_leaves_no_trace(two_ranks: Any, name: str) -> None:
    """In probing (steps 0 and 1) and training, at the beginning of a window."""
    config, how = SETTINGS[name]
    bad = [] if how == "always" else [(0, 0), (3, 0)]
    found = two_ranks.run(discarding, config=config, bad=bad, how=how)
    assert difference(found, two_ranks.run(discarding, config=config, bad=[])) is None


@pytest.mark.parametrize("stage", tiered([1, 2, 3], 2))
def test_all_that_a_window_has_collected_goes(two_ranks: Any, stage: int) -> None:
    """With the second micro-batch of a window the first one goes, too: it is as if its loss had been 0."""
    config = ds_config(stage=stage, gas=2, grass=FULL)
    found = two_ranks.run(discarding, config=config, bad=[(2, 1)])
    expected = two_ranks.run(discarding, config=config, bad=[(2, 1)], lost=True)
    everything = two_ranks.run(discarding, config=config, bad=[])
    for one, other, kept in zip(found, expected, everything, strict=True):
        assert difference(one["weights"], other["weights"]) is None
        assert difference(one["weights"], kept["weights"])


def scores_of_second_micro_batch(gas: int) -> list[float]:
    """Probe two steps; of two micro-batches the first is thrown away, or there is only the second."""
    with engine_of(ds_config(gas=gas, grass=PROBING)) as engine:
        for step in range(2):
            for micro in range(2 - gas, 2):
                backward(engine, step, micro)
                if micro == 0:
                    engine.zero_grad()
                engine.step()
        return list(engine.grass.scores)


def test_importance_is_that_of_the_micro_batches_that_were_kept(two_ranks: Any) -> None:
    """The engine halves the loss of each of two micro-batches, which is exact and undone by the score."""
    assert two_ranks.run(scores_of_second_micro_batch, gas=2) == two_ranks.run(scores_of_second_micro_batch, gas=1)


def step_without_gradients(stage: int) -> dict[str, Any]:
    with engine_of(ds_config(stage=stage, grass=grass_block(sampler="uniform"))) as engine:
        before = snapshot(engine.module)
        backward(engine, 0)
        engine.zero_grad()
        engine.step()
        found = {
            "unmoved": difference(before, snapshot(engine.module)) is None,
            "counted": engine.optimizer.controller.step,
            "skipped": engine.skipped_steps,
            "norm": engine.get_global_grad_norm(),
        }
        backward(engine, 1)
        engine.step()
        return {**found, "moves again": difference(before, snapshot(engine.module)) is not None}


@pytest.mark.parametrize("stage", tiered([1, 2, 3], 1))
def test_a_step_without_gradients_updates_nothing_and_is_not_counted(two_ranks: Any, stage: int) -> None:
    for found in two_ranks.run(step_without_gradients, stage=stage):
        assert found == {"unmoved": True, "counted": 0, "skipped": 1, "norm": 0.0, "moves again": True}


def discard_on_one_rank() -> str:
    with engine_of(ds_config(grass=grass_block(sampler="uniform"))) as engine:
        backward(engine, 0)
        if engine.global_rank == 0:
            engine.zero_grad()
        try:
            engine.step()
        except RankDivergenceError as error:
            return str(error)
        return ""


def test_ranks_that_disagree_stop_together(two_ranks: Any) -> None:
    for message in two_ranks.run(discard_on_one_rank):
        assert "zero_grad() was called on some ranks only" in message
