# SPDX-License-Identifier: Apache-2.0
"""Wherever optimizer state is kept, a run gives the same bits as with all state on the device."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.disks import aio_or_skip
from helpers.lazy_streams import LazyCopies
from helpers.models import ds_config, engine_of, grass_block, split_groups, tiny_llama, train
from helpers.observed import difference, fp16_allowed, observe
from helpers.tiered import tiered
from torch import nn

pytestmark = pytest.mark.dist

STEPS, PERIOD = 36, 3
LAYERS, GAMMA = 5, 2
WHOLE = 10**6  # elements: larger than any unit
Offload = dict[str, Any]


def sampled(**settings: Any) -> dict[str, Any]:
    return grass_block(num_active_layers=GAMMA, sample_period=PERIOD, **settings)


MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


@contextmanager
def offloaded(
    config: Mapping[str, Any], offload: Offload, folder: Path, make: MakeOptimizer | None = None
) -> Iterator[Any]:
    """An engine with two units per layer and this ``offload`` block; ``lazy`` in it: the device delays its copies."""
    config = copy.deepcopy(dict(config))
    settings = {"nvme_path": str(folder), **offload} if offload["device"] == "nvme" else dict(offload)
    lazy = settings.pop("lazy", False)
    config["grass"]["offload"] = settings
    model = tiny_llama(layers=LAYERS)
    arguments: dict[str, Any] = {"model_parameters": split_groups(model)}
    if make is not None:
        del config["optimizer"]
        arguments = {"optimizer": make(split_groups(model))}
    with ExitStack() as stack:
        if lazy:
            parts = "grass_ds.offload.build.copies_for"
            stack.enter_context(mock.patch(parts, lambda device, trace: LazyCopies(trace)))
        yield stack.enter_context(engine_of(config, model, **arguments))


# ---- plain runs -----------------------------------------------------------------------------------------------------


def run(config: Mapping[str, Any], offload: Offload, folder: Path) -> dict[str, Any]:
    """What a run is made of after the last step, and what it went through."""
    active = set()
    with offloaded(config, offload, folder) as engine:
        losses = train(engine, STEPS, after_step=lambda _: active.add(engine.grass.active_layers))
        chunks = max(len(engine.optimizer.store.chunks(unit)) for unit in engine.optimizer.units)
        return {"observed": {**observe(engine), "losses": losses}, "sets": len(active), "chunks": chunks}


def compare(config: dict[str, Any], offloads: dict[str, Offload], folder: Path) -> dict[str, Any]:
    """Where each of ``offloads`` differs from no offload, in a format that loses nothing or else in theirs."""
    formats = {offload.get("state_format", "fp32") for offload in offloads.values()}
    kept = {} if formats & {"fp32", "exact"} else {"state_format": formats.pop()}
    with fp16_allowed():
        reference = run(config, {"device": "none", **kept}, folder)
        report: dict[str, Any] = {
            "sets": reference["sets"],
            "skipped": reference["observed"]["steps"][1],
            "differences": {},
            "chunks": {},
        }
        for name, offload in offloads.items():
            result = run(config, offload, folder)
            report["differences"][name] = difference(reference["observed"], result["observed"])
            report["chunks"][name] = result["chunks"]
        return report


CPU, POSIX, AIO = {"device": "cpu"}, {"device": "nvme", "io": "posix"}, {"device": "nvme", "io": "aio"}
STREAM, PERIODIC = {"residency": "stream"}, {"residency": "period"}
GRAIN, ODD, UNIT = {"chunk_numel": 1}, {"chunk_numel": 1500}, {"chunk_numel": WHOLE}
LATE = {"prefetch": "step"}
EXACT, BF16, BITS8 = ({"state_format": name} for name in ("exact", "bf16", "8bit"))


def buffers(device: int, host: int | None = None) -> Offload:
    return {"device_buffers": device, "host_buffers": host}


# name -> (pool, config, offload blocks; the keys say what is special)
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Offload]]] = {
    "fp32, two of five layers": (
        "two_ranks",
        ds_config(grass=sampled(sampler="uniform")),
        {
            "cpu stream grain": {**CPU, **STREAM, **GRAIN},
            "cpu period odd": {**CPU, **PERIODIC, **ODD},
            "cpu stream odd lazy": {**CPU, **STREAM, **ODD, "lazy": True},
            "posix stream grain through files": {**POSIX, **STREAM, **GRAIN, **buffers(2, 4), "checksum": True},
            "aio period grain": {**AIO, **PERIODIC, **GRAIN, **buffers(1, 3)},
            "aio stream whole in buffers": {**AIO, **STREAM, **UNIT},
        },
    ),
    "bf16, probing again and refreshing, accumulation, clipping": (
        "two_ranks",
        ds_config(
            stage=1,
            dtype="bf16",
            gas=2,
            clip=0.5,
            grass=sampled(sampler="grass", reprobe_period=10, always_active=["embed"]),
        ),
        {
            "cpu stream odd late": {**CPU, **STREAM, **ODD, **buffers(1), **LATE},
            "aio stream odd through files late": {**AIO, **STREAM, **ODD, **buffers(3, 5), **LATE, "checksum": True},
            "posix period odd late": {**POSIX, **PERIODIC, **ODD, **LATE},
            "exact cpu stream odd": {**CPU, **STREAM, **ODD, **EXACT},
            "exact posix period grain": {**POSIX, **PERIODIC, **GRAIN, **EXACT, "checksum": True},
        },
    ),
    "bf16, exact": (
        "two_ranks",
        ds_config(stage=1, dtype="bf16", grass=sampled(sampler="uniform", expansion=0.5, always_active=["embed"])),
        {
            "none odd": {"device": "none", **ODD, **EXACT},
            "cpu stream odd": {**CPU, **STREAM, **ODD, **EXACT},
            "aio stream grain through files": {**AIO, **STREAM, **GRAIN, **buffers(2, 4), "checksum": True, **EXACT},
        },
    ),
    "fp32, exact": (
        "two_ranks",
        ds_config(grass=sampled(sampler="uniform", expansion=0.5)),
        {
            "none whole": {"device": "none", **EXACT},
            "cpu period odd lazy": {**CPU, **PERIODIC, **ODD, **EXACT, "lazy": True},
        },
    ),
    "bf16, moments in bf16": (
        "two_ranks",
        ds_config(dtype="bf16", grass=sampled(sampler="uniform", expansion=0.5)),
        {
            "cpu stream odd lazy": {**CPU, **STREAM, **ODD, **BF16, "lazy": True},
            "cpu period grain": {**CPU, **PERIODIC, **GRAIN, **BF16},
            "posix stream grain through files": {
                **POSIX,
                **STREAM,
                **GRAIN,
                **buffers(2, 4),
                "checksum": True,
                **BF16,
            },
        },
    ),
    "bf16, moments in 8 bits": (
        "two_ranks",
        ds_config(dtype="bf16", grass=sampled(sampler="uniform", expansion=0.5)),
        {
            "cpu stream odd lazy": {**CPU, **STREAM, **ODD, **BITS8, "lazy": True},
            "cpu period grain": {**CPU, **PERIODIC, **GRAIN, **BITS8},
            "posix stream grain through files": {
                **POSIX,
                **STREAM,
                **GRAIN,
                **buffers(2, 4),
                "checksum": True,
                **BITS8,
            },
        },
    ),
    "fp16, moments in 8 bits, skipped steps": (
        "two_ranks",
        ds_config(
            dtype="fp16",
            fp16={"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3},
            grass=sampled(sampler="cyclic"),
        ),
        {
            "cpu stream odd": {**CPU, **STREAM, **ODD, **BITS8},
            "posix period grain": {**POSIX, **PERIODIC, **GRAIN, **BITS8},
        },
    ),
    "fp16, skipped steps": (
        "two_ranks",
        ds_config(
            dtype="fp16",
            fp16={"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3},
            grass=sampled(sampler="cyclic"),
        ),
        {
            "cpu stream whole": {**CPU, **STREAM, **UNIT, **buffers(3)},
            "cpu period grain lazy": {**CPU, **PERIODIC, **GRAIN, "lazy": True},
            "posix stream odd through files": {**POSIX, **STREAM, **ODD, **buffers(1, 3), "checksum": True},
            "posix period whole": {**POSIX, **PERIODIC, **UNIT, "checksum": True},
            "aio stream grain in buffers": {**AIO, **STREAM, **GRAIN},
        },
    ),
    "bf16, reset on switch, probing again, one rank": (
        "one_rank",
        ds_config(dtype="bf16", grass=sampled(sampler="grass", reprobe_period=12, state_on_switch="reset")),
        {
            "cpu stream odd": {**CPU, **STREAM, **ODD},
            "posix stream grain through files lazy": {**POSIX, **STREAM, **GRAIN, **buffers(1, 3), "lazy": True},
            "aio period odd": {**AIO, **PERIODIC, **ODD, "checksum": True},
        },
    ),
    "bf16, four ranks": (
        "four_ranks",
        ds_config(dtype="bf16", grass=sampled(sampler="uniform")),
        {
            "posix stream whole": {**POSIX, **STREAM, **UNIT, **buffers(2, 5)},
            "aio stream odd through files": {**AIO, **STREAM, **ODD, **buffers(2, 4)},
        },
    ),
}


@pytest.mark.parametrize(
    "case",
    tiered(
        RUNS,
        "fp32, two of five layers",
        "bf16, probing again and refreshing, accumulation, clipping",
        "bf16, exact",
        "bf16, moments in 8 bits",
        "fp16, skipped steps",
    ),
)
def test_every_tier_and_policy_gives_the_same_bits(request: pytest.FixtureRequest, case: str, tmp_path: Path) -> None:
    aio_or_skip()
    pool, config, offloads = RUNS[case]
    arguments = {"config": config, "offloads": offloads, "folder": tmp_path}
    for report in request.getfixturevalue(pool).run(compare, timeout=400.0, **arguments):
        assert report["differences"] == dict.fromkeys(offloads)
        assert report["sets"] > 5  # it did switch
        probed = 3 * 2  # twice more, two steps each
        assert (report["skipped"] == probed) == ("probing again" in case)
        assert (report["skipped"] > probed) == ("skipped" in case)
        for name, chunks in report["chunks"].items():
            assert chunks > 2 if "grain" in name else chunks == 1 if "whole" in name else chunks > 1
    assert list(tmp_path.iterdir()) == []


# ---- other optimizers -----------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "no state": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "centred, momentum": partial(torch.optim.RMSprop, lr=1e-3, centered=True, momentum=0.5),
    "amsgrad": partial(torch.optim.AdamW, lr=1e-3, amsgrad=True),
    "fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
    "starts at one": partial(torch.optim.NAdam, lr=1e-3),
    "starts at the step size": partial(torch.optim.Rprop, lr=1e-3),
}
PLANES = dict(zip(OPTIMIZERS, (1, 2, 4, 4, 3, 3, 3), strict=True))


def compare_optimizers(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Planes of each optimizer's state, and where streaming it in small chunks makes a difference."""
    found: dict[str, Any] = {}
    for name, make in OPTIMIZERS.items():
        seen = []
        for offload in ({"device": "none"}, {**CPU, **GRAIN}):
            with offloaded(config, offload, folder, make) as engine:
                losses = train(engine, 4 * PERIOD)
                state = engine.optimizer.store[next(unit for unit in engine.optimizer.units if unit.always)]
                seen.append({**observe(engine), "losses": losses})
        found[name] = (1 + len(state.moments), difference(*seen))
    return found


def test_other_optimizers(two_ranks: Any, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", grass=sampled(sampler="uniform"), zero_allow_untested_optimizer=True)
    for found in two_ranks.run(compare_optimizers, config=config, folder=tmp_path, timeout=400.0):
        assert found == {name: (PLANES[name], None) for name in OPTIMIZERS}


# ---- from outside a step --------------------------------------------------------------------------------------------


def move_between_tiers(config: dict[str, Any], offloads: list[Offload], folder: Path) -> str | None:
    """A straight run, and one that is saved and loaded into another kind of offload in mid-period."""
    legs = 7  # steps: not a multiple of the period
    straightly = {"device": "none", "state_format": offloads[0].get("state_format", "fp32")}
    with offloaded(config, straightly, folder) as engine:
        losses = train(engine, legs * len(offloads))
        straight = {**observe(engine), "losses": losses}
    losses, seen = [], {}
    for leg, offload in enumerate(offloads):
        with offloaded(config, offload, folder) as engine:
            if leg:
                engine.load_checkpoint(folder / "saved", tag=f"leg {leg - 1}")
            losses += train(engine, legs, start=leg * legs)
            engine.save_checkpoint(folder / "saved", tag=f"leg {leg}")
            seen = observe(engine)
    return difference(straight, {**seen, "losses": losses})


@pytest.mark.parametrize("name", ["bf16", "8bit"])
def test_a_checkpoint_continues_in_its_format(two_ranks: Any, name: str, tmp_path: Path) -> None:
    """Which loses something in every step, but nothing more by a checkpoint."""
    offloads = [{**CPU, **GRAIN}, {"device": "none"}, {**POSIX, **PERIODIC, **ODD}]
    config = ds_config(dtype="bf16", grass=sampled(sampler="uniform", expansion=0.5))
    arguments = {
        "config": config,
        "folder": tmp_path,
        "offloads": [{**each, "state_format": name} for each in offloads],
    }
    assert two_ranks.run(move_between_tiers, timeout=400.0, **arguments) == [None, None]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_continues_under_any_offload(two_ranks: Any, dtype: str, tmp_path: Path) -> None:
    """And in either format that loses nothing."""
    offloads = [
        {**CPU, **GRAIN},
        {**POSIX, **ODD, **buffers(2, 4)},
        {"device": "none", **EXACT},
        {**POSIX, **PERIODIC, **GRAIN, **EXACT},
        {**CPU, **PERIODIC, **UNIT},
    ]
    config = ds_config(dtype=dtype, grass=sampled(sampler="grass"))
    arguments = {"config": config, "offloads": offloads, "folder": tmp_path}
    assert two_ranks.run(move_between_tiers, timeout=400.0, **arguments) == [None, None]


def rewrite_and_go_on(config: dict[str, Any], offload: Offload, folder: Path) -> dict[str, Any]:
    """Set weights and moments of active, inactive and never drawn layers, after a step and after backward."""
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
    )

    with offloaded(config, offload, folder) as engine:
        named: dict[str, nn.Parameter] = dict(engine.module.named_parameters())
        matrices = [name for name in named if "down_proj" in name or "input_layernorm" in name]
        read: list[torch.Tensor] = []

        def rewrite(step: int) -> None:
            for number, name in enumerate(matrices):
                value = safe_get_full_fp32_param(named[name])
                safe_set_full_fp32_param(named[name], value * (1 + 2.0**-8 * (number + step)))
                stepped = any(
                    unit in engine.optimizer.store and name in unit.param_names for unit in engine.optimizer.units
                )
                if stepped and step % 2:
                    moment = safe_get_full_optimizer_state(named[name], "exp_avg")
                    safe_set_full_optimizer_state(named[name], moment * 0.5, "exp_avg")
                read.append(safe_get_full_fp32_param(named[name]).clone())

        hook = engine.module.model.embed_tokens.register_forward_hook
        for step in range(4 * PERIOD):
            train(engine, 1, start=step, after_step=rewrite if step in (1, 4, 5) else None)
            if step == 6:  # by the next step's forward pass, its chunks are on their way
                hooked = hook(lambda *_: rewrite(6))
                train(engine, 1, start=100)
                hooked.remove()
        return {**observe(engine), "read": dict(enumerate(read))}


def compare_rewritten(config: dict[str, Any], offloads: list[Offload], folder: Path) -> list[str | None]:
    first, *others = (rewrite_and_go_on(config, offload, folder) for offload in ({"device": "none"}, *offloads))
    return [difference(first, other) for other in others]


def test_values_set_in_mid_period_are_kept_and_used(two_ranks: Any, tmp_path: Path) -> None:
    offloads = [
        {**POSIX, **GRAIN, **buffers(2, 4), "checksum": True},
        {**POSIX, **ODD},
        {**CPU, **PERIODIC, **ODD},
        {**CPU, **GRAIN},
        {**POSIX, **PERIODIC, **UNIT},
        {**CPU, **ODD, **EXACT},
        {"device": "none", **EXACT},
    ]
    config = ds_config(dtype="bf16", lr=1e-2, grass=sampled(sampler="uniform"))
    found = two_ranks.run(compare_rewritten, config=config, offloads=offloads, folder=tmp_path, timeout=400.0)
    assert found == [[None] * len(offloads)] * 2
