# SPDX-License-Identifier: Apache-2.0
"""Which weights ZeRO-3 gathers and when, and how its trace of modules changes."""

from typing import Any
from unittest import mock

import pytest
import torch
from helpers.models import batch, engine_of, loss_of, snapshot, tiny_llama, train
from helpers.small import HIDDEN, PERIOD, WORLD, model_for, part
from helpers.tiered import tiered
from helpers.traffic import Collectives, Gathers
from helpers.zero3 import (
    AHEAD,
    BARE,
    DEFAULT,
    NAMES,
    PERSISTENT,
    calls_to,
    config_of,
    from_shards,
    layers_in,
    status,
)

from grass_ds.zero import stage3

pytestmark = pytest.mark.dist

# ---- gathers of weights, and the trace that they follow -------------------------------------------------------------


def watch_gathers(
    config: dict[str, Any], steps: int, reentrant: bool | None = None, frozen: bool = False
) -> list[dict[str, Any]]:
    """Per micro-step: which weights were gathered when, the bytes, and whether DeepSpeed's trace was valid."""
    model, records, invalidated = model_for(config), [], []
    model.get_input_embeddings().requires_grad_(not frozen)
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with engine_of(config, model) as engine:
        gathers = Gathers(model)
        with calls_to("_invalidate_trace", lambda _: invalidated.append(gathers.phase)):
            for step in range(steps):
                for micro in range(engine.gradient_accumulation_steps()):
                    gathers.clear()
                    record: dict[str, Any] = {"active": engine.grass.active_layers, "before": status(model)}
                    gathers.phase = "forward"
                    with Collectives() as sent:
                        loss = loss_of(engine, step, micro)
                        coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
                        record |= {"complete": coordinator.is_complete_trace(), "ahead": sorted(gathers.ahead)}
                        gathers.phase = "backward"
                        engine.backward(loss)
                    record |= {"bytes": sent.bytes_of("allgather_base"), "after": status(model)}
                    gathers.phase = "step"
                    engine.step()
                    record |= {phase: gathers.names(phase) for phase in ("forward", "backward", "step")}
                    record |= {"invalidated": list(invalidated)}
                    record |= {"next": engine.grass.active_layers}
                    invalidated.clear()
                    records.append(record)
    return records


ABOVE = {"model.norm.weight", "lm_head.weight"}


def reached(lowest: int) -> list[str]:
    """Parameters that backward needs, down to a layer."""
    return sorted(n for n in NAMES if n in ABOVE or any(layer >= lowest for layer in layers_in([n])))


@pytest.mark.parametrize(
    ("pool", "zero"),
    [("two_ranks", BARE), ("four_ranks", BARE), ("two_ranks", AHEAD), ("two_ranks", DEFAULT)],
    ids=["bare", "bare-four-ranks", "ahead", "default"],
)
def test_backward_gathers_nothing_below_the_lowest_active_layer(
    request: pytest.FixtureRequest, pool: str, zero: dict[str, Any]
) -> None:
    """Neither fetched nor prefetched, in the first step of a period and later; inactive layers above it are."""
    world = WORLD[pool]
    # embed is idle; layers come as 0, 1, 2, 3, 0: the lowest active layer rises and falls, and most layers above it do not train
    records = request.getfixturevalue(pool).run(watch_gathers, config=config_of(zero, {}), steps=5 * PERIOD)
    for steps in records:
        assert [step["active"] for step in steps] == [(layer,) for layer in (0, 1, 2, 3, 0) for _ in range(PERIOD)]
        for number, step in enumerate(steps):
            lowest = min(step["active"])
            gathered = step["forward"] + step["backward"]
            assert step["bytes"] == 4 * world * sum(part(NAMES[name], world) for name in gathered)
            assert set(step["forward"]) == NAMES.keys()
            assert set(step["backward"]) <= set(reached(lowest))
            assert all(gathered.count(name) == 1 for name in NAMES.keys() - set(reached(lowest)))
            if zero is BARE:
                assert gathered == [*sorted(NAMES), *reached(lowest)]
            elif number % PERIOD:  # by a trace: all of a forward pass is under way before it is needed
                assert step["complete"] and set(step["ahead"]) == NAMES.keys()
            assert step["step"] == [] and step["before"] == step["after"] == {"NOT_AVAILABLE"}


def train_by_matrices(config: dict[str, Any], most: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    """The weights after a run with at most so many traces, and how many there were after each step."""
    counts = []
    with mock.patch.object(stage3, "MOST_TRACES", most), engine_of(config, tiny_llama(hidden=HIDDEN)) as engine:
        train(engine, 14, after_step=lambda step: counts.append(len(engine.optimizer.coordinators)))
        return snapshot(engine.module), counts


def test_traces_of_sets_of_matrices_are_bounded(two_ranks: Any) -> None:
    grass = {"sampler": "module", "module_budget": 0.1, "sample_period": 1}
    config = config_of(DEFAULT, grass)
    few, many = (two_ranks.run(train_by_matrices, config=config, most=most) for most in (3, 256))
    for (weights, counts), (expected, unbounded) in zip(few, many, strict=True):
        assert max(counts) == 3 and max(unbounded) > 6
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


# name -> (sampler's block, use_reentrant, micro-steps, whether the end of backward moves with the layers)
TRACES: dict[str, tuple[dict[str, Any], bool | None, int, bool]] = {
    "embeddings-idle": ({}, None, 1, True),
    "embeddings-idle-gas2": ({}, None, 2, True),
    "non-reentrant": ({}, False, 1, True),
    "reentrant": ({}, True, 1, False),
    "from-the-top": ({"sampler": "cyclic", "cyclic_order": "descending", "num_active_layers": 1}, None, 1, True),
    "embeddings-frozen-by-user": ({"always_active": ["embed", "norm"]}, None, 1, True),
    "embeddings-active": ({"always_active": ["embed", "norm"]}, None, 1, False),
}


@pytest.mark.parametrize(
    "case", tiered(TRACES, "embeddings-idle-gas2", "reentrant", "non-reentrant", "embeddings-frozen-by-user")
)
def test_every_lowest_layer_has_a_trace_that_its_first_step_records(two_ranks: Any, case: str) -> None:
    block, reentrant, gas, moves = TRACES[case]
    config = config_of(AHEAD, {"sampler": "uniform", "num_active_layers": 2, "seed": 3, **block}, gas=gas)
    arguments = {"config": config, "reentrant": reentrant, "frozen": "frozen" in case}
    for steps in two_ranks.run(watch_gathers, steps=9 * PERIOD, **arguments):
        seen: set[int] = set()
        for number, step in enumerate(steps):
            lowest = min(step["active"]) if moves else 0
            fresh = lowest not in seen
            seen.add(lowest)
            # by us before the first pass with a lowest layer, never by DeepSpeed; the first coordinator serves layer 0
            assert step["invalidated"] == ["forward"] * (fresh and number > 0 and lowest > 0)
            assert step["complete"] != fresh
            assert set(step["ahead"]) == (set() if fresh else NAMES.keys())
            assert step["after"] == {"NOT_AVAILABLE"}
        switches = [(min(s["active"]), min(s["next"])) for s in steps if s["active"] != s["next"]]
        assert len({after for _, after in switches}) < sum(
            before != after for before, after in switches
        )  # some return
        assert case == "from-the-top" or any(before == after for before, after in switches)  # and some stay


# ---- evaluation -----------------------------------------------------------------------------------------------------


def evaluate_between(config: dict[str, Any], moments: set[str]) -> list[dict[str, Any]]:
    """Train, and evaluate where told; every evaluation must compute with what the shards say at that time."""
    model, plain, records, now = model_for(config), model_for(config), [], {"phase": ""}
    ids = batch(99, 0, 0)
    with engine_of(config, model) as engine:

        @torch.no_grad()
        def evaluate(moment: str) -> None:
            if moment not in moments:
                return
            plain.load_state_dict(from_shards(model))
            engine.eval()
            logits = engine(input_ids=ids).logits
            engine.train()
            assert torch.equal(logits, plain.eval()(input_ids=ids).logits), moment
            records[-1]["left"] |= status(model)

        with calls_to("_invalidate_trace", lambda _: records[-1]["invalidated"].append(now["phase"])):
            for step in range(6 * PERIOD):
                active = engine.grass.active_layers
                records.append({"invalidated": [], "left": set(), "active": active})
                for micro in range(engine.gradient_accumulation_steps()):
                    now["phase"] = "train"
                    loss = loss_of(engine, step, micro)
                    evaluate("between forward and backward")
                    engine.backward(loss)
                    evaluate("before the step")
                    now["phase"] = "step"
                    engine.step()
                    now["phase"] = "evaluation"
                evaluate("after the step")
                if active != engine.grass.active_layers:
                    evaluate("after a switch")
                if step == 0:  # what an evaluation has prefetched must not be in the way of others
                    shards = from_shards(model)
                    assert all(torch.equal(weight, shards[name]) for name, weight in snapshot(model).items())
    return records


SETTINGS = {"ahead": AHEAD, "persistent": PERSISTENT, "default": DEFAULT}


@pytest.mark.parametrize(
    ("settings", "gas", "moment"),
    tiered(
        [
            (settings, *moment)
            for settings in SETTINGS
            for moment in ((1, "before the step"), (2, "before the step"), (1, "after a switch"))
        ],
        ("ahead", 1, "before the step"),
        ("ahead", 1, "after a switch"),
        ("persistent", 1, "after a switch"),
        ("default", 2, "before the step"),
    ),
)
def test_evaluation_sees_the_weights_as_they_are(two_ranks: Any, settings: str, gas: int, moment: str) -> None:
    zero = SETTINGS[settings]
    for steps in two_ranks.run(evaluate_between, config=config_of(zero, {}, gas=gas), moments={moment}):
        seen = {steps[0]["active"]}
        for after in steps[1:]:
            fresh = after["active"] not in seen
            seen.add(after["active"])
            assert after["invalidated"] == ["train"] * fresh  # an evaluation is never taken for a whole pass
        assert steps[-1]["active"] == steps[PERIOD]["active"]  # a layer came back
        if moment == "before the step" and zero is AHEAD:
            assert "INFLIGHT" in steps[0]["left"]  # weights were on the way when the step wrote them
