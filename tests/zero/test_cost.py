# SPDX-License-Identifier: Apache-2.0
"""What layers cost: inactive ones nothing, active ones what the formulas here say.

Nothing is taken on the library's word: collectives are counted where torch dispatches them, memory is the bytes of the
live storages.
"""

import gc
from typing import Any

import pytest
import torch
from helpers.live import LiveBytes, hooks_on, settle
from helpers.models import VOCAB, batch, ds_config, engine_of, grass_block, tiny_llama, train
from helpers.small import ALIGNMENT, GRAIN, HIDDEN, LAYERS, PERIOD, STATE, STEP_COUNT, WORLD, model_for, width
from helpers.traffic import Collectives

pytestmark = pytest.mark.dist

NORM = HIDDEN  # elements of the final norm
TEMPLATE = STEP_COUNT  # a fresh step count, kept to begin with

LAYER = sum(p.numel() for p in tiny_llama(hidden=HIDDEN, layers=1).model.layers.parameters())


def shard(numel: int, world: int) -> int:
    """Elements per rank: rounded up so that every rank has the same, aligned number."""
    return -(-numel // (ALIGNMENT * world)) * ALIGNMENT


def cyclic(**settings: Any) -> dict[str, Any]:
    return grass_block(sampler="cyclic", cyclic_order="ascending", sample_period=PERIOD, **settings)


def weight_bytes(config: dict[str, Any], world: int) -> int:
    """The model in the layout of the run: blocks, embedding and head, final norm."""
    shards = LAYERS * shard(LAYER, world) + 2 * shard(VOCAB * HIDDEN, world) + shard(NORM, world)
    return width(config) * world * shards


def state_bytes(layers: int, world: int) -> int:
    """Optimizer state of ``layers`` layers and of the final norm on one rank."""
    return STATE * (layers * shard(LAYER, world) + shard(NORM, world))


def buffer_bytes(world: int) -> int:
    """Two device buffers, each as large as the largest shard that trains: a layer's."""
    return 2 * STATE * -(-shard(LAYER, world) // GRAIN) * GRAIN


def run_backward(engine: Any, step: int, micro: int) -> None:
    ids = batch(step, micro, engine.global_rank)
    engine.backward(engine(input_ids=ids, labels=ids).loss)


# ---- traffic and gradients ------------------------------------------------------------------------------------------


def watch_steps(config: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """Per step: what was sent, what the library says it holds, and whose gradients came.

    Between backward and step nothing may be alive but weights, resting states, the two device buffers that states come
    into, and a shard with its squared norm per active unit.
    """
    model, fired, steps = model_for(config), set(), []
    for name, param in model.named_parameters():  # before the library's own hooks, which take the gradients away
        param.register_post_accumulate_grad_hook(lambda _, name=name: fired.add(name))
    with LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        for step in range(3 * PERIOD):
            fired.clear()
            record: dict[str, Any] = {"active": engine.grass.active_layers, "backward": []}
            for micro in range(engine.gradient_accumulation_steps()):
                if micro:
                    engine.step()
                with Collectives() as sent:
                    run_backward(engine, step, micro)
                record["backward"].append(sent.calls)
                assert all(param.grad is None for param in model.parameters())
            seen = sum(count > 0 for count in engine.grass.visits)
            resting = weight_bytes(config, world) + bool(step) * (state_bytes(seen, world) + STEP_COUNT * (seen + 1))
            shards = [shard(NORM, world)] + [shard(LAYER, world)] * len(record["active"])
            expected = resting + TEMPLATE + buffer_bytes(world) + width(config) * sum(shards) + 4 * len(shards)
            assert settle(live, expected) == expected
            record["held"] = engine.grass.memory()["gradients"]["device"]
            with Collectives() as sent:
                engine.step()
            record["step"] = sent.calls
            record["fired"] = set(fired)
            assert all(param.grad is None for param in model.parameters())
            assert engine.grass.memory()["gradients"]["device"] == 0
            steps.append(record)
    return steps


# name -> (pool, config, active layers, micro-steps that reduce)
TRAFFIC: dict[str, tuple[str, dict[str, Any], int, tuple[int, ...]]] = {
    "zero2-fp32": ("two_ranks", {}, 1, (0,)),
    "zero2-bf16-two-layers-gas3": ("two_ranks", {"dtype": "bf16", "gas": 3}, 2, (0, 1, 2)),
    "zero1-fp32-gas3": ("two_ranks", {"stage": 1, "gas": 3}, 1, (2,)),
    "zero1-bf16-clip-gas2": ("two_ranks", {"stage": 1, "dtype": "bf16", "gas": 2, "clip": 0.1}, 1, (1,)),
    "zero2-bf16-all-layers": ("two_ranks", {"dtype": "bf16"}, LAYERS, (0,)),
    "zero2-fp32-one-rank": ("one_rank", {}, 1, (0,)),
    "zero2-bf16-four-ranks": ("four_ranks", {"dtype": "bf16"}, 1, (0,)),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_traffic_and_gradients_are_those_of_the_active_layers(request: pytest.FixtureRequest, case: str) -> None:
    pool, settings, gamma, reducing = TRAFFIC[case]
    gas, world = settings.get("gas", 1), WORLD[pool]
    config = ds_config(grass=cyclic(num_active_layers=gamma), **settings)
    for steps in request.getfixturevalue(pool).run(watch_steps, config=config, world=world):
        for number, step in enumerate(steps):
            assert len(step["active"]) == gamma
            units = [NORM] + [LAYER] * gamma  # final norm first: that is how backward meets them
            shards = [width(config) * shard(numel, world) for numel in units]
            reductions = [("reduce_scatter_base", world * size) for size in shards]
            assert step["backward"] == [reductions if micro in reducing else [] for micro in range(gas)]
            gathers = [("allgather_base", world * size) for size in shards] if world > 1 else []
            # one vector: per unit the squared norm of the sum and that of the parts, and whether there is one; micro-steps, squared, too
            norms = [("allreduce", 4 * (3 * len(units) + 2))]
            fingerprint = [("allreduce", 2 * 6 * 8)] if gamma < LAYERS and (number + 1) % PERIOD == 0 else []
            assert step["step"] == norms + gathers + fingerprint
            assert step["held"] == sum(shards)
            layers = {int(name.split(".")[2]) for name in step["fired"] if "layers" in name}
            assert layers == set(step["active"])
            assert {name for name in step["fired"] if "layers" not in name} == {"model.norm.weight"}


# ---- peaks ----------------------------------------------------------------------------------------------------------

SHARD = shard(LAYER, 2)
FLAT = 2 * SHARD


def watch_gradient_peak(config: dict[str, Any], probe: bool) -> tuple[int, int]:
    """High-water mark of unit-sized storages over one step's backward passes, and what the library reports.

    The reduction is a local stand-in: gloo's threads would keep what they sent for a moment longer.
    """
    from deepspeed import comm

    model, stock = model_for(config), comm.reduce_scatter_tensor
    sizes = {size * numel for size in (2, 4) for numel in (SHARD, FLAT)}
    with engine_of(config, model) as engine:
        assert (engine.grass.phase == "probe") == probe
        comm.reduce_scatter_tensor = lambda output, flat, group=None: output.copy_(flat[: output.numel()])
        try:
            with LiveBytes(sizes=sizes, ignore=model.parameters()) as live:
                for micro in range(engine.gradient_accumulation_steps()):
                    if micro:
                        engine.step()
                    run_backward(engine, 0, micro)
        finally:
            comm.reduce_scatter_tensor = stock
        return live.peak, engine.grass.memory(peak=True)["gradients"]["device"]


# name -> (config, sampler's block, largest number of gradient bytes held at once)
PEAKS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    # the shards of the units done and of the one in flight, and the latter's flat gradient
    "zero2-fp32": ({}, cyclic(num_active_layers=3), 4 * (3 * SHARD + FLAT)),
    "zero2-bf16-gas2": ({"dtype": "bf16", "gas": 2}, cyclic(num_active_layers=3), 2 * (4 * SHARD + FLAT)),
    # accumulates whole gradients, all of them there when the first reduction of the boundary starts
    "zero1-fp32-gas2": ({"stage": 1, "gas": 2}, cyclic(num_active_layers=3), 4 * (3 * FLAT + SHARD)),
    # shards wait in fp32: their bf16 form on the wire comes on top
    "zero2-bf16-fp32-accumulation": (
        {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}},
        cyclic(num_active_layers=3),
        4 * 3 * SHARD + 2 * (FLAT + SHARD),
    ),
    # probing keeps nothing: one unit, however many layers and micro-steps
    "zero2-probe": ({}, grass_block(), 4 * (FLAT + SHARD)),
    "zero2-probe-bf16-gas2": ({"dtype": "bf16", "gas": 2}, grass_block(), 2 * (FLAT + SHARD)),
    "zero1-probe-gas2": ({"stage": 1, "gas": 2}, grass_block(), 4 * (FLAT + SHARD)),
}


@pytest.mark.parametrize("case", PEAKS)
def test_gradient_peak(two_ranks: Any, case: str) -> None:
    settings, block, limit = PEAKS[case]
    config = ds_config(grass={**block, "always_active": []}, **settings)
    for measured, reported in two_ranks.run(watch_gradient_peak, config=config, probe="probe" in case):
        assert measured == limit
        assert reported == measured


def watch_construction(config: dict[str, Any]) -> tuple[int, int]:
    """Bytes beyond the model's own: at the peak of initialize() and after it, where only padding may be left."""
    model, padded = model_for(config), weight_bytes(config, world=2)
    weights = sum(p.nbytes for p in model.parameters())
    with LiveBytes(model.parameters()) as live, engine_of(config, model):
        peak = live.peak
        assert settle(live, padded + TEMPLATE) == padded + TEMPLATE
        return peak - weights, padded - weights


@pytest.mark.parametrize(("stage", "dtype"), [(1, "fp32"), (2, "bf16")])
def test_construction_needs_at_most_two_units_beside_the_model(two_ranks: Any, stage: int, dtype: str) -> None:
    config = ds_config(stage=stage, dtype=dtype, grass=cyclic())
    for peak, after in two_ranks.run(watch_construction, config=config):
        unit = width(config) * FLAT
        assert unit <= peak <= 2 * unit
        assert after < unit // 100


# ---- optimizer state ------------------------------------------------------------------------------------------------


def watch_state(config: dict[str, Any], world: int, held: list[int]) -> list[dict[str, Any]]:
    """Between steps: visited layers, and what the library reports; that many layers' states and the device buffers
    must be alive, and nothing else."""
    model, between = model_for(config), []
    with LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        for step in range(PERIOD * LAYERS):
            train(engine, 1, start=step)
            visited = sum(count > 0 for count in engine.grass.visits)
            peak = engine.grass.memory(peak=True)["optimizer_state"]["device"]
            expected = weight_bytes(config, world) + state_bytes(held[step], world) + STEP_COUNT * (held[step] + 1)
            expected += TEMPLATE + (0 if config["grass"]["offload"]["device"] == "none" else buffer_bytes(world))
            assert settle(live, expected) == expected
            between.append({"visited": visited, "peak": peak, **engine.grass.memory()["optimizer_state"]})
    return between


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
@pytest.mark.parametrize(("place", "on_switch"), [("cpu", "keep"), ("none", "keep"), ("cpu", "reset")])
def test_optimizer_state_is_that_of_layers_ever_active(
    request: pytest.FixtureRequest, place: str, on_switch: str, pool: str
) -> None:
    world = WORLD[pool]
    config = ds_config(dtype="bf16", grass=cyclic(offload={"device": place}, state_on_switch=on_switch))
    steps = range(PERIOD * LAYERS)
    # dropped at the switch, or kept
    held = [int((step + 1) % PERIOD > 0) if on_switch == "reset" else step // PERIOD + 1 for step in steps]
    for between in request.getfixturevalue(pool).run(watch_state, config=config, world=world, held=held):
        for step, now in enumerate(between):
            state = state_bytes(held[step], world)
            assert now["visited"] == step // PERIOD + 1
            assert (now["device"], now["host"]) == ((state, 0) if place == "none" else (buffer_bytes(world), state))
            assert now["peak"] == now["device"]


def train_long(config: dict[str, Any], switches: tuple[int, int]) -> list[dict[str, Any]]:
    """What is alive after the first and the second number of switches."""
    model, census = model_for(config), []
    with LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        for start, end in zip((0, switches[0]), switches, strict=True):
            train(engine, end - start, start=start)
            alive = weight_bytes(config, world=2) + state_bytes(LAYERS, world=2) + STEP_COUNT * (LAYERS + 1)
            alive += TEMPLATE + buffer_bytes(world=2)
            assert settle(live, alive) == alive
            gc.collect()  # of what earlier tests left in this process, too
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            host, visits = engine.grass.memory()["optimizer_state"]["host"], engine.grass.visits
            census.append({"tensors": tensors, "hooks": hooks_on(model), "host": host, "visits": visits})
    return census


def test_nothing_grows_over_fifty_switches(two_ranks: Any) -> None:
    config = ds_config(dtype="bf16", grass=grass_block(sampler="cyclic", cyclic_order="random", sample_period=1))
    for early, late in two_ranks.run(train_long, config=config, switches=(8, 58)):
        assert min(early.pop("visits")) > 0
        assert sum(late.pop("visits")) == 58
        assert late == early
