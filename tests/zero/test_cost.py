# SPDX-License-Identifier: Apache-2.0
"""What layers cost in every ZeRO stage: inactive ones nothing, active ones what the formulas here say.

Nothing is taken on the library's word: collectives are counted where torch dispatches them, memory is the bytes of the
live storages.
"""

import gc
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm
from helpers.live import LiveBytes, hooks_on, wait_for_bytes
from helpers.models import cyclic, ds_config, engine_of, grass_block, loss_of, train
from helpers.small import (
    EMBED,
    HIDDEN,
    LAYER,
    LAYERS,
    NORM,
    PERIOD,
    STEP_COUNT,
    WORLD,
    buffer_bytes,
    layers_of,
    model_for,
    part,
    shard,
    state_bytes,
    weight_bytes,
    width,
)
from helpers.traffic import Collectives
from helpers.zero3 import AHEAD, BARE, DEFAULT, NAMES, PERSISTENT, layers_in

from grass_ds.offload.codecs import dynamic_map

pytestmark = pytest.mark.dist

TEMPLATE = STEP_COUNT  # a fresh step count, kept to begin with
IN_FLIGHT = 1024  # bytes: small exchanges that gloo's threads hold a moment longer


def stage_of(config: dict[str, Any]) -> int:
    return int(config["zero_optimization"]["stage"])


def resting_bytes(config: dict[str, Any], world: int, layers: int | list[list[int]] | None) -> int:
    """Weights, and the states of so many blocks or of these layers, and of the norm; None before the first step."""
    count = layers if isinstance(layers, int) else len(layers or [])
    bytes_of_states = 0 if layers is None else state_bytes(config, layers, world) + STEP_COUNT * (count + 1)
    return weight_bytes(config, world) + bytes_of_states + TEMPLATE


def run_backward(engine: Any, step: int) -> list[list[tuple[str, int]]]:
    """All micro-steps of a step up to the last backward; what each backward sent, gathers of ZeRO-3 left out."""
    calls = []
    for micro in range(engine.gradient_accumulation_steps()):
        if micro:
            engine.step()
        loss = loss_of(engine, step, micro)
        with Collectives() as sent:
            engine.backward(loss)
        calls.append([call for call in sent.calls if call[0] != "allgather_base"])
    return calls


# ---- traffic and gradients ------------------------------------------------------------------------------------------


def watch_steps(config: dict[str, Any], world: int) -> list[dict[str, Any]]:
    """Per step: what was sent, what the library says it holds, and whose gradients came.

    Between backward and step nothing may be alive but weights, resting states, the two device buffers that states come
    into, a shard per active unit, two bits per element per expanded one, and the squared norms of both.
    """
    model, fired, steps, stage = model_for(config), set(), [], stage_of(config)
    model.eval()  # as ``from_pretrained`` leaves it
    sizes = layers_of(config)
    for name, param in model.named_parameters():  # before the library's own hooks, which take the gradients away
        param.register_post_accumulate_grad_hook(lambda _, name=name: fired.add(name))
    maps = [dynamic_map(signed, torch.device("cpu")) for signed in (True, False)]  # of 8bit: two of 1 KB for ever
    with LiveBytes(model.parameters(), ignore=maps) as live, engine_of(config, model) as engine:
        for step in range(3 * PERIOD):
            fired.clear()
            active = engine.grass.active_layers
            expanded = set(range(min(active), LAYERS)) - set(active) if "expansion" in config["grass"] else set()
            backward = run_backward(engine, step)
            assert all(param.grad is None for param in model.parameters())
            seen = [size for size, count in zip(sizes, engine.grass.visits, strict=True) if count > 0]
            gathered = [n for n, p in model.named_parameters() if stage == 3 and p.ds_status.name != "NOT_AVAILABLE"]
            shards = [shard(unit, world, stage) for unit in (NORM, *(sizes[layer] for layer in active))]
            expected = resting_bytes(config, world, seen if step else None) + buffer_bytes(config, world)
            gradients = width(config) * sum(shards) + len(expanded) * shard(LAYER, world, stage) // 4
            expected += gradients + width(config) * HIDDEN * len(gathered) + 4 * (len(shards) + len(expanded))
            assert wait_for_bytes(live, expected) == expected
            memory = engine.grass.memory()
            assert memory["gradients"]["device"] == gradients
            on_host = state_bytes(config, seen, world) if step else 0
            assert memory["optimizer_state"] == {"device": buffer_bytes(config, world), "host": on_host}
            with Collectives() as sent:
                engine.step()
            assert all(param.grad is None for param in model.parameters())
            assert engine.grass.memory()["gradients"]["device"] == 0
            layers = {
                "active": active,
                "with_gradient": {*active, *expanded},
                "switched": active != engine.grass.active_layers,
            }
            steps.append(
                {**layers, "backward": backward, "step": sent.calls, "gathered": gathered, "fired": set(fired)}
            )
    return steps


# name -> (pool, config, config of ZeRO, active layers (0: matrices within a budget), micro-steps that reduce)
TRAFFIC: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, tuple[int, ...]]] = {
    "zero2-fp32": ("two_ranks", {}, {}, 1, (0,)),
    "zero2-bf16-two-layers-gas3": ("two_ranks", {"dtype": "bf16", "gas": 3}, {}, 2, (0, 1, 2)),
    "zero1-fp32-gas3": ("two_ranks", {"stage": 1, "gas": 3}, {}, 1, (2,)),
    "zero1-bf16-clip-gas2": ("two_ranks", {"stage": 1, "dtype": "bf16", "gas": 2, "clip": 0.1}, {}, 1, (1,)),
    "zero2-bf16-all-layers": ("two_ranks", {"dtype": "bf16"}, {}, LAYERS, (0,)),
    "zero2-fp32-one-rank": ("one_rank", {}, {}, 1, (0,)),
    "zero2-bf16-four-ranks": ("four_ranks", {"dtype": "bf16"}, {}, 1, (0,)),
    "zero3-fp32": ("two_ranks", {"stage": 3}, DEFAULT, 1, (0,)),
    "zero3-bf16-two-layers-gas3": ("two_ranks", {"stage": 3, "dtype": "bf16", "gas": 3}, AHEAD, 2, (0, 1, 2)),
    "zero3-bf16-all-layers": ("two_ranks", {"stage": 3, "dtype": "bf16"}, AHEAD, LAYERS, (0,)),
    "zero3-persistent-norms": ("two_ranks", {"stage": 3}, PERSISTENT, 2, (0,)),
    "zero3-one-rank": ("one_rank", {"stage": 3}, AHEAD, 1, (0,)),
    "zero3-four-ranks": ("four_ranks", {"stage": 3, "dtype": "bf16"}, AHEAD, 1, (0,)),
    "zero1-bf16-exact": ("two_ranks", {"stage": 1, "dtype": "bf16"}, {}, 1, (0,)),
    "zero3-bf16-8bit": ("two_ranks", {"stage": 3, "dtype": "bf16"}, AHEAD, 2, (0,)),
    "zero2-bf16-expansion": ("two_ranks", {"dtype": "bf16"}, {}, 1, (0,)),
    "zero1-fp32-expansion-gas2": ("two_ranks", {"stage": 1, "gas": 2}, {}, 2, (1,)),
    "zero3-expansion": ("two_ranks", {"stage": 3}, DEFAULT, 1, (0,)),
    "zero2-bf16-module": ("two_ranks", {"dtype": "bf16"}, {}, 0, (0,)),
    "zero1-module-gas2": ("two_ranks", {"stage": 1, "gas": 2}, {}, 0, (0, 1)),
    "zero3-module": ("two_ranks", {"stage": 3}, DEFAULT, 0, (0,)),
}


@pytest.mark.parametrize("case", TRAFFIC)
def test_traffic_and_memory_are_those_of_the_active_layers(request: pytest.FixtureRequest, case: str) -> None:
    pool, settings, zero, gamma, reducing = TRAFFIC[case]
    gas, world = settings.get("gas", 1), WORLD[pool]
    more: dict[str, Any] = {"expansion": 0.1} if "expansion" in case else {}
    name = case.rpartition("-")[2]
    if name in ("exact", "8bit"):
        more["offload"] = {"state_format": name}
    if gamma:
        block = cyclic(PERIOD, num_active_layers=gamma, **more)
    else:
        block = grass_block(sampler="module", module_budget=0.2, sample_period=PERIOD, state_on_switch="keep")
    config = ds_config(grass=block, zero_optimization=zero, **settings)
    stage, sizes = stage_of(config), layers_of(config)
    matrices = [name for name in NAMES if "layers" in name and "norm" not in name]
    for steps in request.getfixturevalue(pool).run(watch_steps, config=config, world=world):
        for number, step in enumerate(steps):
            if gamma:
                assert len(step["active"]) == gamma
            else:
                assert 0.1 < sum(sizes[layer][0] for layer in step["active"]) / sum(map(sum, sizes)) <= 0.2
            # final norm first: that is how backward meets them
            units = [NORM, *(sizes[layer] for layer in sorted(step["with_gradient"], reverse=True))]
            flats = [width(config) * world * shard(sizes, world, stage) for sizes in units]
            reductions = [("reduce_scatter_base", flat) for flat in flats]
            assert step["backward"] == [reductions if micro in reducing else [] for micro in range(gas)]
            gathers = [("allgather_base", flat) for flat in flats] if world > 1 else []
            if stage == 3:  # of what was gathered to stay, that which has moved
                moved = [n for n in step["gathered"] if "layers" not in n or layers_in([n]) & set(step["active"])]
                together = width(config) * world * part(HIDDEN, world) * len(moved)
                gathers = [("allgather_base", together)] if moved else []
                stay = "persistent" in case and number % PERIOD > 0
                assert (len(step["gathered"]), len(moved)) == (
                    (2 * LAYERS + 1, 2 * gamma + 1) if stay else (0, 0)
                ) or ("persistent" in case and not stay)
            # one vector: per unit the squared norm of the sum and that of the parts, and whether there is one; micro-steps, squared, too
            norms = [("allreduce", 4 * (3 * len(units) + 2))]
            draws = step["switched"] or (gamma < LAYERS and (number + 1) % PERIOD == 0)
            fingerprint = [("allreduce", 2 * 6 * 8)] if draws else []
            assert step["step"] == norms + gathers + fingerprint
            if gamma:
                assert layers_in(step["fired"]) == step["with_gradient"]
            else:
                assert {matrices[layer] for layer in step["active"]} == {n for n in step["fired"] if "layers" in n}
            assert {name for name in step["fired"] if "layers" not in name} == {"model.norm.weight"}


# ---- peaks ----------------------------------------------------------------------------------------------------------


def watch_gradient_peak(config: dict[str, Any], probe: bool) -> tuple[int, int]:
    """High-water mark of unit-sized storages over one step's backward passes, and what the library reports.

    The reduction is a local stand-in: gloo's threads would keep what they sent for a moment longer.
    """
    model, stock = model_for(config), comm.reduce_scatter_tensor
    one = shard(LAYER, 2, stage_of(config))
    sizes = {size * numel for size in (2, 4) for numel in (one, 2 * one)}
    with engine_of(config, model) as engine:
        assert (engine.grass.phase == "probe") == probe
        comm.reduce_scatter_tensor = lambda output, flat, group=None: output.copy_(flat[: output.numel()])
        weights = [getattr(param, "ds_tensor", param) for param in model.parameters()]
        try:
            with LiveBytes(sizes=sizes, ignore=weights) as live:
                run_backward(engine, 0)
        finally:
            comm.reduce_scatter_tensor = stock
        return live.peak, engine.grass.memory(peak=True)["gradients"]["device"]


FP32_ACCUMULATION = {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}
# name -> (config, largest number of gradient bytes held at once, in bytes per element of a layer's shard)
PEAKS: dict[str, tuple[dict[str, Any], int]] = {
    # the shards of the units done and of the one in flight, and the latter's flat gradient: two shards
    "zero2-fp32": ({}, 4 * (3 + 2)),
    "zero2-bf16-gas2": ({"dtype": "bf16", "gas": 2}, 2 * (4 + 2)),
    "zero3-fp32": ({"stage": 3, "zero_optimization": BARE}, 4 * (3 + 2)),
    # accumulates whole gradients, all of them there when the first reduction of the boundary starts
    "zero1-fp32-gas2": ({"stage": 1, "gas": 2}, 4 * (3 * 2 + 1)),
    # shards wait in fp32: their bf16 form on the wire comes on top
    "zero2-bf16-fp32-accumulation": (FP32_ACCUMULATION, 4 * 3 + 2 * (2 + 1)),
    # probing keeps nothing: one unit, however many layers and micro-steps
    "zero2-probe": ({}, 4 * (2 + 1)),
    "zero1-probe-gas2": ({"stage": 1, "gas": 2}, 4 * (2 + 1)),
    "zero3-probe-bf16-gas2": ({"stage": 3, "dtype": "bf16", "gas": 2, "zero_optimization": BARE}, 2 * (2 + 1)),
}


@pytest.mark.parametrize("case", PEAKS)
def test_gradient_peak(two_ranks: Any, case: str) -> None:
    settings, limit = PEAKS[case]
    block = grass_block() if "probe" in case else cyclic(PERIOD, num_active_layers=3)
    config = ds_config(grass={**block, "always_active": []}, **settings)
    expected = limit * shard(LAYER, 2, stage_of(config))
    assert two_ranks.run(watch_gradient_peak, config=config, probe="probe" in case) == [(expected, expected)] * 2


def watch_construction(config: dict[str, Any], in_parts: bool) -> tuple[int, int]:
    """Bytes beyond the model's own: at the peak of initialize() and after it, where only padding may be left."""
    if in_parts:
        with deepspeed.zero.Init(config_dict_or_path={**config, "train_batch_size": 4}):
            model = model_for(config)
    else:
        model = model_for(config)
    weights = [getattr(param, "ds_tensor", param) for param in model.parameters()]
    own, after = sum(weight.nbytes for weight in weights), weight_bytes(config, world=2) + TEMPLATE
    with LiveBytes(weights) as live, engine_of(config, model):
        peak = live.peak
        assert wait_for_bytes(live, after) == after
        return peak - own, after - own


@pytest.mark.parametrize(
    ("stage", "dtype", "in_parts"), [(1, "fp32", False), (2, "bf16", False), (3, "fp32", False), (3, "fp32", True)]
)
def test_construction_needs_at_most_two_units_beside_the_model(
    two_ranks: Any, stage: int, dtype: str, in_parts: bool
) -> None:
    """ZeRO-3 needs its part of one unit."""
    config = ds_config(stage=stage, dtype=dtype, grass=cyclic(PERIOD), zero_optimization=BARE if stage == 3 else {})
    largest = width(config) * max(shard(LAYER, 2, stage), shard(EMBED, 2, stage))
    limit = largest + IN_FLIGHT if stage == 3 else 2 * 2 * width(config) * shard(LAYER, 2, stage)
    for peak, after in two_ranks.run(watch_construction, config=config, in_parts=in_parts):
        assert peak <= limit
        assert after < limit // 100 + (IN_FLIGHT if stage == 3 else 0)


# ---- optimizer state ------------------------------------------------------------------------------------------------


def watch_state(config: dict[str, Any], world: int, held: list[int]) -> list[dict[str, Any]]:
    """Between steps: visited layers, and what the library reports; that many layers' states and the device buffers
    must be alive, and nothing else."""
    model, between = model_for(config), []
    on_device = config["grass"]["offload"]["device"] == "none"
    with LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        for step in range(PERIOD * LAYERS):
            train(engine, 1, start=step)
            visited = sum(count > 0 for count in engine.grass.visits)
            peak = engine.grass.memory(peak=True)["optimizer_state"]["device"]
            buffers = 0 if on_device else buffer_bytes(config, world)
            expected = resting_bytes(config, world, held[step]) + buffers
            assert wait_for_bytes(live, expected) == expected
            between.append({"visited": visited, "peak": peak, **engine.grass.memory()["optimizer_state"]})
    return between


@pytest.mark.parametrize(
    ("pool", "stage", "device", "on_switch"),
    [
        ("four_ranks", 2, "cpu", "keep"),
        ("two_ranks", 2, "none", "keep"),
        ("two_ranks", 2, "cpu", "reset"),
        ("two_ranks", 3, "none", "reset"),
    ],
)
def test_optimizer_state_is_that_of_layers_ever_active(
    request: pytest.FixtureRequest, pool: str, stage: int, device: str, on_switch: str
) -> None:
    world = WORLD[pool]
    block = cyclic(PERIOD, offload={"device": device}, state_on_switch=on_switch)
    config = ds_config(stage=stage, dtype="bf16", grass=block, zero_optimization=BARE if stage == 3 else {})
    steps = range(PERIOD * LAYERS)
    # dropped at the switch, or kept
    held = [int((step + 1) % PERIOD > 0) if on_switch == "reset" else step // PERIOD + 1 for step in steps]
    for between in request.getfixturevalue(pool).run(watch_state, config=config, world=world, held=held):
        for step, now in enumerate(between):
            state, buffers = state_bytes(config, held[step], world), buffer_bytes(config, world)
            assert now["visited"] == step // PERIOD + 1
            assert (now["device"], now["host"]) == ((state, 0) if device == "none" else (buffers, state))
            assert now["peak"] == max(state_bytes(config, 1, world), state) if device == "none" else now["device"]


def train_long(config: dict[str, Any], switches: tuple[int, int]) -> list[dict[str, Any]]:
    """What is alive after the first and the second number of switches."""
    model, census = model_for(config), []
    with LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        for start, end in zip((0, switches[0]), switches, strict=True):
            train(engine, end - start, start=start)
            alive = resting_bytes(config, 2, LAYERS) + buffer_bytes(config, 2)
            assert wait_for_bytes(live, alive) == alive
            gc.collect()  # of what earlier tests left in this process, too
            tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
            host, visits = engine.grass.memory()["optimizer_state"]["host"], engine.grass.visits
            census.append({"tensors": tensors, "hooks": hooks_on(model), "host": host, "visits": visits})
    return census


@pytest.mark.parametrize(("stage", "zero"), [(2, {}), (3, AHEAD)], ids=["zero2", "zero3"])
def test_nothing_grows_over_fifty_switches(two_ranks: Any, stage: int, zero: dict[str, Any]) -> None:
    block = grass_block(sampler="cyclic", cyclic_order="random", sample_period=1)
    config = ds_config(stage=stage, dtype="bf16", grass=block, zero_optimization=zero)
    for early, late in two_ranks.run(train_long, config=config, switches=(8, 58)):
        assert min(early.pop("visits")) > 0
        assert sum(late.pop("visits")) == 58
        assert late == early
