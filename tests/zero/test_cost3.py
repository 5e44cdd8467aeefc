# SPDX-License-Identifier: Apache-2.0
"""What layers cost in ZeRO-3, where every rank has only its part of the weights: the formulas are here, the library is
not asked.

Collectives are counted where torch dispatches them, memory is the bytes of the live storages.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from helpers.live import LiveBytes, hooks_on, settle
from helpers.models import engine_of, loss_of, train
from helpers.small import HIDDEN, LAYERS, PERIOD, STEP_COUNT, WORLD, model_for, width
from helpers.traffic import Collectives, Gathers
from helpers.zero3 import (
    AHEAD,
    BARE,
    DEFAULT,
    EMBED,
    LAYER,
    NAMES,
    NORM,
    PERSISTENT,
    buffer_bytes,
    calls_to,
    config_of,
    from_shards,
    layers_in,
    part,
    shard,
    state_bytes,
    status,
    weight_bytes,
)

pytestmark = pytest.mark.dist

# ---- traffic, gradients and what is alive between backward and step -------------------------------------------------


def watch_steps(config: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """Per step: what was sent and gathered, and whose gradients came.

    Between backward and step nothing may be alive but partitions, resting states, the two device buffers that states
    come into, and a shard with its squared norm per active unit.
    """
    model, fired, steps = model_for(config), set(), []
    model.eval()  # as ``from_pretrained`` leaves it
    for name, param in model.named_parameters():  # before the library's own hooks, which take the gradients away
        param.register_post_accumulate_grad_hook(lambda _, name=name: fired.add(name))
    with LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        gathers = Gathers(model)
        for step in range(3 * PERIOD):
            fired.clear()
            gathers.clear()
            record: dict[str, Any] = {"active": engine.grass.active_layers, "reduced": []}
            for micro in range(engine.gradient_accumulation_steps()):
                if micro:
                    engine.step()
                loss = loss_of(engine, step, micro)
                with Collectives() as sent:
                    engine.backward(loss)
                record["reduced"].append([call for call in sent.calls if call[0] != "allgather_base"])
                assert all(param.grad is None for param in model.parameters())
            del loss
            seen = sum(count > 0 for count in engine.grass.visits)
            held = [n for n, p in model.named_parameters() if p.ds_status.name != "NOT_AVAILABLE"]
            counts = STEP_COUNT * (1 + bool(step) * (seen + 1))  # one more is kept to begin with
            resting = weight_bytes(config, world) + bool(step) * state_bytes(seen, world) + counts
            shards = [shard(NORM, world)] + [shard(LAYER, world)] * len(record["active"])
            expected = (
                resting + buffer_bytes(world) + width(config) * (sum(shards) + HIDDEN * len(held)) + 4 * len(shards)
            )
            assert settle(live, expected) == expected
            state = engine.grass.memory()["optimizer_state"]
            assert (state["device"], state["host"]) == (buffer_bytes(world), bool(step) * state_bytes(seen, world))
            gathers.phase = "step"
            with Collectives() as sent:
                engine.step()
            gathers.phase = ""
            record |= {"step": sent.calls, "gathered": gathers.names("step"), "held": held, "fired": set(fired)}
            steps.append(record)
    return steps


# name -> (pool, config of ZeRO, further config, active layers)
TRAFFIC: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "fp32": ("two_ranks", DEFAULT, {}, 1),
    "bf16-two-layers-gas3": ("two_ranks", AHEAD, {"dtype": "bf16", "gas": 3, "clip": 0.1}, 2),
    "bf16-all-layers": ("two_ranks", AHEAD, {"dtype": "bf16"}, LAYERS),
    "persistent-norms": ("two_ranks", PERSISTENT, {}, 2),
    "one-rank": ("one_rank", AHEAD, {}, 1),
    "four-ranks": ("four_ranks", AHEAD, {"dtype": "bf16"}, 1),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_traffic_and_memory_are_those_of_the_active_layers(request: pytest.FixtureRequest, case: str) -> None:
    pool, zero, settings, gamma = TRAFFIC[case]
    gas, world = settings.get("gas", 1), WORLD[pool]
    config = config_of(zero, {"num_active_layers": gamma}, **settings)
    for steps in request.getfixturevalue(pool).run(watch_steps, config=config, world=world):
        for number, step in enumerate(steps):
            assert len(step["active"]) == gamma
            units = [NORM] + [LAYER] * gamma  # final norm first: that is how backward meets them
            reductions = [("reduce_scatter_base", width(config) * world * shard(sizes, world)) for sizes in units]
            assert step["reduced"] == [reductions] * gas
            # one vector: per unit the squared norm of the sum and that of the parts, and whether there is one; micro-steps, squared, too
            norms = [("allreduce", 4 * (3 * len(units) + 2))]
            fingerprint = [("allreduce", 2 * 6 * 8)] if gamma < LAYERS and (number + 1) % PERIOD == 0 else []
            # of what was gathered to stay, that which has moved
            moved = [n for n in step["held"] if n == "model.norm.weight" or layers_in([n]) & set(step["active"])]
            assert step["gathered"] == sorted(moved)
            together = width(config) * world * part(HIDDEN, world) * len(moved)
            weights = [("allgather_base", together)] if moved else []
            assert step["step"] == norms + weights + fingerprint
            if case == "persistent-norms":
                assert len(step["held"]) == 2 * LAYERS + 1 or number % PERIOD == 0
                assert len(moved) == 2 * gamma + 1 or number % PERIOD == 0
            else:
                assert step["held"] == []
            assert layers_in(step["fired"]) == set(step["active"])
            assert {name for name in step["fired"] if "layers" not in name} == {"model.norm.weight"}


def watch_gradient_peak(config: dict[str, Any], probe: bool, sizes: set[int]) -> int:
    """High-water mark of storages of these sizes over one step's backward passes.

    The reduction is a local stand-in: gloo's threads would keep what they sent for a moment longer.
    """
    from deepspeed import comm

    model, stock = model_for(config), comm.reduce_scatter_tensor
    with engine_of(config, model) as engine:
        assert (engine.grass.phase == "probe") == probe
        comm.reduce_scatter_tensor = lambda output, flat, group=None: output.copy_(flat[: output.numel()])
        try:
            with LiveBytes(sizes=sizes, ignore=[param.ds_tensor for param in model.parameters()]) as live:
                for micro in range(engine.gradient_accumulation_steps()):
                    if micro:
                        engine.step()
                    engine.backward(loss_of(engine, 0, micro))
        finally:
            comm.reduce_scatter_tensor = stock
        return live.peak


@pytest.mark.parametrize(("probe", "gas", "dtype"), [(True, 2, "bf16"), (False, 1, "fp32")])
def test_gradient_peak(two_ranks: Any, probe: bool, gas: int, dtype: str) -> None:
    """Probing holds one unit's flat gradient and shard; training the shards of the units done beside them."""
    block = {"sampler": "grass" if probe else "cyclic", "num_active_layers": 3, "always_active": []}
    config = config_of(BARE, block, dtype=dtype, gas=gas)
    one, flat = (width(config) * numel for numel in (shard(LAYER, 2), 2 * shard(LAYER, 2)))
    expected = [flat + one if probe else flat + 3 * one] * 2
    assert two_ranks.run(watch_gradient_peak, config=config, probe=probe, sizes={one, flat}) == expected


# ---- construction, growth, the end ----------------------------------------------------------------------------------


IN_FLIGHT = 1024  # bytes: small exchanges that gloo's threads hold a moment longer


def watch_construction(config: dict[str, Any], whole: int, partitioned: int) -> tuple[int, int]:
    """Bytes beyond the model's own at the peak of initialize(), from a whole model and from one built in zero.Init."""
    import deepspeed

    with LiveBytes((model := model_for(config)).parameters()) as live, engine_of(config, model):
        first = live.peak - whole
        assert settle(live, partitioned) == partitioned
    with deepspeed.zero.Init(config_dict_or_path={**config, "train_batch_size": 4}):
        model = model_for(config)
    with LiveBytes([param.ds_tensor for param in model.parameters()]) as live, engine_of(config, model):
        return first, live.peak - partitioned


def test_construction_needs_at_most_one_unit_beside_the_model(two_ranks: Any) -> None:
    config = config_of(BARE, {})
    whole, partitioned = 4 * sum(NAMES.values()), weight_bytes(config, 2) + STEP_COUNT
    largest = 4 * max(shard(LAYER, 2), shard(EMBED, 2))
    for peaks in two_ranks.run(watch_construction, config=config, whole=whole, partitioned=partitioned):
        assert max(peaks) <= largest + IN_FLIGHT


def train_long(config: dict[str, Any], switches: tuple[int, int]) -> list[dict[str, Any]]:
    """What is alive after the first and the second number of switches."""
    model, census = model_for(config), []
    with LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        for start, end in zip((0, switches[0]), switches, strict=True):
            train(engine, end - start, start=start)
            alive = weight_bytes(config, world=2) + state_bytes(LAYERS, world=2) + STEP_COUNT * (LAYERS + 2)
            alive += buffer_bytes(world=2)
            assert settle(live, alive) == alive
            gc.collect()  # of what earlier tests left in this process, too
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            census.append({"tensors": tensors, "hooks": hooks_on(model), "visits": engine.grass.visits})
    return census


def test_nothing_grows_over_fifty_switches(two_ranks: Any) -> None:
    config = config_of(AHEAD, {"cyclic_order": "random", "sample_period": 1}, dtype="bf16")
    for early, late in two_ranks.run(train_long, config=config, switches=(8, 58)):
        assert min(early.pop("visits")) > 0
        assert sum(late.pop("visits")) == 58
        assert late == early


def train_twice(config: dict[str, Any]) -> None:
    """An engine after another on one model: as on a new model with the same weights, and the first one is gone."""
    model = model_for(config)
    before = hooks_on(model)
    with engine_of(config, model) as engine:
        train(engine, 3)
        first = weakref.ref(engine.optimizer)
    assert hooks_on(model) == before
    assert all(param.requires_grad for param in model.parameters())
    del engine
    gc.collect()
    assert first() is None
    fresh = model_for(config)
    fresh.load_state_dict(from_shards(model))
    gathering: set[Any] = set()
    with engine_of(config, model) as engine:
        with calls_to("fetch_sub_module", gathering.add):
            losses = train(engine, 3)
        assert gathering and gathering <= set(engine.optimizer.coordinators.values())
        assert status(model) == {"NOT_AVAILABLE"}
    with engine_of(config, fresh) as engine:
        assert losses == train(engine, 3)


def test_a_second_engine_on_the_model_starts_afresh(two_ranks: Any) -> None:
    two_ranks.run(train_twice, config=config_of(AHEAD, {"cyclic_order": "descending"}))
