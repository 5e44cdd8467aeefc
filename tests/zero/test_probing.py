# SPDX-License-Identifier: Apache-2.0
"""Probing measures and updates nothing; importance is the same in probing and training; which steps count."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import rounding
from helpers.models import (
    RELEASED,
    backward,
    batch,
    ds_config,
    engine_of,
    grass_block,
    layer_of,
    snapshot,
    tiny_llama,
    train,
    without_optimizer,
)
from helpers.observed import difference, fp16_allowed, observe
from helpers.small import buffer_bytes
from helpers.tiered import tiered
from torch import nn

pytestmark = pytest.mark.dist

HIDDEN, PROBE, PERIOD, REFRESH = 24, 3, 2, 4


def probing(**settings: Any) -> dict[str, Any]:
    return grass_block(**{"probe_steps": PROBE, "sample_period": PERIOD, "refresh_period": REFRESH, **settings})


def rank() -> int:
    return torch.distributed.get_rank()


# ---- nothing moves --------------------------------------------------------------------------------------------------


def probe_and_train(config: dict[str, Any], scheduler: str) -> dict[str, Any]:
    """Probe, then train three steps. Everything that must stand still is asserted here; returns the learning rates."""
    model = tiny_llama(hidden=HIDDEN)
    arguments: dict[str, Any] = {}
    if scheduler == "torch":
        config = without_optimizer(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        arguments = {"optimizer": optimizer, "lr_scheduler": schedule}
    rates: list[float] = []
    with engine_of(config, model, **arguments) as engine:
        start, weights = engine.get_lr(), snapshot(model)

        def stands_still(step: int) -> None:
            assert difference(weights, snapshot(model)) is None
            assert engine.grass.memory()["optimizer_state"] == {"device": 0, "host": 0}
            assert engine.grass.memory()["gradients"] == {"device": 0, "host": 0}
            assert engine.grass.memory(peak=True)["optimizer_state"]["device"] == 0
            assert not engine.optimizer.state
            assert engine.get_lr() == start
            assert not engine.was_step_applied()
            assert engine.grass.visits == (0, 0, 0, 0)
            # the engine counts probe steps like skipped ones: they consumed a batch and updated nothing
            assert (engine.global_steps, engine.skipped_steps) == (step + 1, step + 1)
            assert (engine.grass.phase == "probe") == (engine.grass.scores is None) == (step < PROBE - 1)

        assert engine.grass.active_layers == (0, 1, 2, 3)
        train(engine, PROBE, after_step=stands_still)
        train(engine, 3, start=PROBE, after_step=lambda _: rates.append(engine.get_lr()[0]))
        assert (engine.global_steps, engine.skipped_steps) == (PROBE + 3, PROBE)
        assert engine.was_step_applied()
        assert difference(weights, snapshot(model))
        assert sum(engine.grass.visits) == 3
    return {"start": start[0], "rates": rates}


@pytest.mark.parametrize(
    ("stage", "dtype", "gas", "scheduler"),
    [(2, "bf16", 1, "torch"), (1, "fp32", 3, "deepspeed"), (3, "bf16", 2, "torch"), (3, "fp32", 1, "deepspeed")],
)
def test_probing_moves_nothing_and_advances_no_schedule(
    two_ranks: Any, stage: int, dtype: str, gas: int, scheduler: str
) -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1.0, "warmup_num_steps": 10, "warmup_type": "linear"}}
    extra = {"scheduler": warmup} if scheduler == "deepspeed" else {}
    config = ds_config(stage=stage, dtype=dtype, gas=gas, grass=probing(), **extra)
    for result in two_ranks.run(probe_and_train, config=config, scheduler=scheduler):
        if scheduler == "torch":
            assert [result["start"], *result["rates"]] == pytest.approx([1e-2, 1e-2 / 2, 1e-2 / 3, 1e-2 / 4])
        else:
            assert [result["start"], *result["rates"]] == pytest.approx(
                [0.0, 0.0, 0.1, 0.2]
            )  # its first step sets the start


# ---- what is measured -----------------------------------------------------------------------------------------------


def layer_rms(plain: nn.Module, step: int, gas: int, world: int, scale: float = 1.0) -> list[float]:
    """Per layer sqrt(||g||^2 / N), g averaged over the ranks, and the root mean square of that over micro-batches."""
    squares = [0.0] * len(plain.model.layers)
    for micro in range(gas):
        ids = torch.cat([batch(step, micro, number) for number in range(world)])
        plain.zero_grad()
        (plain(input_ids=ids, labels=ids).loss * scale).backward()
        for index, layer in enumerate(plain.model.layers):
            squares[index] += sum(float((p.grad.double() / scale).square().sum()) for p in layer.parameters())
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in plain.model.layers]
    return [math.sqrt(square / gas / size) for square, size in zip(squares, sizes, strict=True)]


class Truth:
    """A float64 model as the reference, and one of another ``dtype`` to measure the noise of gradients on this CPU."""

    def __init__(self, config: dict[str, Any]):
        self._dtype, self._scale = (
            (torch.float16, config["fp16"]["loss_scale"]) if "fp16" in config else (torch.float32, 1)
        )
        narrow = tiny_llama(hidden=HIDDEN)
        self._models = (rounding.wide(narrow), narrow.to(self._dtype))
        self._numel = sum(param.numel() for param in narrow.model.layers[0].parameters())
        self._world, self._noise = torch.distributed.get_world_size(), 0.0

    def load(self, model: nn.Module) -> None:
        for plain in self._models:
            plain.load_state_dict(snapshot(model))

    def layer_rms(self, step: int, gas: int) -> list[float]:
        true = layer_rms(self._models[0], step, gas, self._world)
        narrow = layer_rms(self._models[1], step, gas, self._world, self._scale)
        self._noise = max(self._noise, *(abs(one / other - 1) for one, other in zip(narrow, true, strict=True)))
        return true

    def tolerance(self, gas: int) -> float:
        """Relative, of a score: a mean of what :meth:`layer_rms` was asked for."""
        return rounding.DRAWS * self._noise + rounding.of_norm(self._numel, self._world, gas)


def measure_both(config: dict[str, Any], refreshes: int) -> tuple[list[tuple[tuple[float, ...], list[float]]], float]:
    """Scores of the engine and of a plain model, after probing and after each refresh; and the tolerance."""
    pairs, model, truth = [], tiny_llama(hidden=HIDDEN), Truth(config)
    with fp16_allowed(), engine_of(config, model) as engine:
        gas, alpha = engine.gradient_accumulation_steps(), 0.25
        probe: list[list[float]] = []
        for step in range(PROBE):
            truth.load(model)
            probe.append(truth.layer_rms(step, gas))
            train(engine, 1, start=step)
        scores = [sum(column) / PROBE for column in zip(*probe, strict=True)]
        pairs.append((engine.grass.scores, list(scores)))
        for refresh in range(refreshes):
            measured: dict[int, list[float]] = {}
            for step in range(PROBE + refresh * REFRESH, PROBE + (refresh + 1) * REFRESH):
                truth.load(model)
                rms = truth.layer_rms(step, gas)
                for layer in engine.grass.active_layers:
                    measured.setdefault(layer, []).append(rms[layer])
                assert engine.grass.scores == pairs[-1][0]  # they stay until the refresh
                train(engine, 1, start=step)
            for layer, values in measured.items():
                scores[layer] = alpha * sum(values) / len(values) + (1 - alpha) * scores[layer]
            for layer in set(range(4)) - measured.keys():
                assert engine.grass.scores[layer] == pairs[-1][0][layer]
            assert 0 < len(measured) < 4  # or one of the two cases was not seen
            pairs.append((engine.grass.scores, list(scores)))
    return pairs, truth.tolerance(gas)


@pytest.mark.parametrize(
    ("pool", "stage", "gas"),
    tiered(
        [
            ("two_ranks", 2, 1),
            ("two_ranks", 2, 3),
            ("two_ranks", 1, 1),
            ("two_ranks", 1, 3),
            ("two_ranks", 3, 1),
            ("two_ranks", 3, 3),
            ("one_rank", 2, 2),
            ("four_ranks", 1, 2),
            ("four_ranks", 3, 2),
        ],
        ("two_ranks", 2, 1),
        ("two_ranks", 1, 3),
        ("two_ranks", 3, 3),
        ("one_rank", 2, 2),
    ),
)
def test_scores_are_those_of_a_plain_model(request: pytest.FixtureRequest, pool: str, stage: int, gas: int) -> None:
    # clipped hard: importance is measured before clipping
    config = ds_config(stage=stage, gas=gas, clip=1e-3, grass=probing(ema_alpha=0.25))
    results = request.getfixturevalue(pool).run(measure_both, config=config, refreshes=2)
    for measured, expected in results[0][0]:
        assert measured == pytest.approx(expected, rel=results[0][1])
        assert max(expected) > 1.05 * min(expected)  # not all alike
    assert all([scores for scores, _ in pairs] == [scores for scores, _ in results[0][0]] for pairs, _ in results)


AGAIN = 5  # steps from one probing to the next: not a multiple of PERIOD


def probe_again(config: dict[str, Any]) -> dict[str, Any]:
    """Probe, train :data:`AGAIN` steps, and probe again, which must change nothing. Measured and expected scores."""
    model, truth = tiny_llama(hidden=HIDDEN), Truth(config)
    expected = []
    with engine_of(config, model) as engine:
        gas = engine.gradient_accumulation_steps()
        train(engine, PROBE + AGAIN)
        before, old = observe(engine), engine.grass.scores
        assert (engine.grass.phase, engine.grass.active_layers) == ("probe", (0, 1, 2, 3))
        assert all(param.requires_grad for param in model.model.layers.parameters())
        truth.load(model)
        for step in range(PROBE + AGAIN, 2 * PROBE + AGAIN):
            expected.append(truth.layer_rms(step, gas))
            assert engine.grass.scores == old
            train(engine, 1, start=step)
            assert not engine.was_step_applied()
            now = observe(engine)
            for kept in ("weights", "state", "visits", "lr"):
                assert difference(before[kept], now[kept], kept) is None
        assert (engine.grass.phase, len(engine.grass.active_layers)) == ("train", 1)
        assert engine.skipped_steps == 2 * PROBE
        measured, drawn = engine.grass.scores, set(engine.grass.active_layers)
        train(engine, 1, start=2 * PROBE + AGAIN)
        trained = observe(engine)
        assert engine.was_step_applied() and sum(trained["visits"]) == AGAIN + 1
        moved = [
            name for name, weight in trained["weights"].items() if not torch.equal(weight, before["weights"][name])
        ]
        assert {layer_of(name) for name in moved} - {None} == drawn
    return {
        "measured": measured,
        "expected": [sum(column) / PROBE for column in zip(*expected, strict=True)],
        "tolerance": truth.tolerance(gas),
    }


@pytest.mark.parametrize(("stage", "gas"), [(1, 1), (2, 2), (3, 1)])
def test_probing_again_measures_the_weights_of_now_and_moves_nothing(two_ranks: Any, stage: int, gas: int) -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 20}}
    block = probing(reprobe_period=AGAIN, refresh_period=100)
    config = ds_config(stage=stage, gas=gas, clip=0.5, grass=block, scheduler=warmup)
    config["zero_optimization"].update(RELEASED)
    results = two_ranks.run(probe_again, config=config)
    for result in results:
        assert result["measured"] == pytest.approx(result["expected"], rel=result["tolerance"])
    assert results[0]["measured"] == results[1]["measured"]


def scores_over_time(config: dict[str, Any]) -> list[tuple[float, ...] | None]:
    scores: list[tuple[float, ...] | None] = []
    with engine_of(config, tiny_llama(hidden=HIDDEN)) as engine:
        train(engine, PROBE + 2 * REFRESH, after_step=lambda _: scores.append(engine.grass.scores))
    return scores


def test_static_scores_are_never_refreshed(two_ranks: Any) -> None:
    for scores in two_ranks.run(scores_over_time, config=ds_config(grass=probing(sampler="static"))):
        assert scores == [None] * (PROBE - 1) + [scores[-1]] * (2 * REFRESH + 1)
        assert scores[-1] is not None


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_scores_do_not_depend_on_the_loss_scale(two_ranks: Any, stage: int) -> None:
    measured = []
    for loss_scale in (64, 4096):
        config = ds_config(stage=stage, dtype="fp16", gas=2, grass=probing(), fp16={"loss_scale": loss_scale})
        ((scores, expected),), tolerance = two_ranks.run(measure_both, config=config, refreshes=0)[0]
        assert scores == pytest.approx(expected, rel=tolerance)
        assert tolerance < 0.1  # a scale left in is a factor of 64
        measured.append((scores, tolerance))
    (one, near), (other, far) = measured
    assert one == pytest.approx(other, rel=near + far)  # the smallest gradients underflow otherwise


# ---- where a switch falls -------------------------------------------------------------------------------------------


def watch_windows(config: dict[str, Any], boundary: str, gas: int) -> list[list[tuple[bool, ...]]]:
    """Which parameters require a gradient at the start and at the end of every micro-step, per accumulation window."""
    model, windows = tiny_llama(hidden=HIDDEN), []

    def pattern() -> tuple[bool, ...]:
        return tuple(p.requires_grad for p in model.parameters())

    with engine_of(config, model) as engine:
        for step in range(PROBE + 5):
            window = []
            for micro in range(gas):
                if boundary == "set by the caller":  # accelerate's way
                    engine.set_gradient_accumulation_boundary(micro == gas - 1)
                window.append(pattern())
                backward(engine, step, micro)
                window.append(pattern())
                if boundary == "counted" or micro == gas - 1:
                    engine.step()
            windows.append(window)
        assert engine.grass.visits != (0, 0, 0, 0)
    return windows


@pytest.mark.parametrize(
    ("stage", "boundary"),
    tiered(
        itertools.product([1, 2, 3], ["counted", "set by the caller", "unmanaged"]),
        (1, "unmanaged"),
        (2, "set by the caller"),
        (3, "counted"),
    ),
)
def test_a_switch_never_falls_inside_an_accumulation_window(two_ranks: Any, stage: int, boundary: str) -> None:
    gas = 3
    extra = {"managed_gradient_accumulation": False} if boundary == "unmanaged" else {}
    block = probing(sampler="grass", sample_period=1, temperature=5.0)
    config = ds_config(stage=stage, gas=gas, grass=block, **extra)
    first, second = two_ranks.run(watch_windows, config=config, boundary=boundary, gas=gas)
    assert first == second
    assert all(len(set(window)) == 1 for window in first)
    starts = [window[0] for window in first]
    assert len(set(starts[:PROBE])) == 1
    assert sum(a != b for a, b in itertools.pairwise(starts)) >= 3  # probing ended, and layers were switched


# ---- steps that do not count ----------------------------------------------------------------------------------------


@contextmanager
def broken_gradients(model: nn.Module) -> Iterator[None]:
    """Every gradient that rank 1 (or the only rank) computes is infinite."""
    mine = rank() == torch.distributed.get_world_size() - 1
    active = [p for p in model.parameters() if mine and p.requires_grad]
    hooks = [p.register_hook(lambda gradient: torch.full_like(gradient, math.inf)) for p in active]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def train_around(config: dict[str, Any], steps: int, bad_before: set[int]) -> dict[str, Any]:
    """Train; before the steps ``bad_before`` one more step, with broken gradients, which must leave no trace."""
    model = tiny_llama(hidden=HIDDEN)
    with engine_of(config, model) as engine:
        controller = engine.optimizer.controller
        for step in range(steps):
            if step in bad_before:
                before, weights = (controller.fingerprint(), controller.visits, engine.get_lr()), snapshot(model)
                memory, skipped = engine.grass.memory(), engine.skipped_steps
                with broken_gradients(model):
                    train(engine, 1, start=999)
                assert (controller.fingerprint(), controller.visits, engine.get_lr()) == before
                held = engine.grass.memory()
                # Device buffers come with the first backward pass that trains.
                if held["optimizer_state"]["device"] == buffer_bytes(
                    engine.config, torch.distributed.get_world_size()
                ):
                    held["optimizer_state"]["device"] = memory["optimizer_state"]["device"]
                assert held == memory
                assert engine.skipped_steps == skipped + 1
                assert not engine.was_step_applied()
                assert engine.get_global_grad_norm() == math.inf
                assert difference(weights, snapshot(model)) is None
            train(engine, 1, start=step)
        state = (controller.fingerprint(), controller.visits, engine.get_lr())
        return {"weights": snapshot(model), "state": state}


# While probing, its last step, the first that trains, before a draw, before a refresh.
BAD_STEPS = {1, PROBE - 1, PROBE, PROBE + PERIOD - 1, PROBE + REFRESH - 1}


@pytest.mark.parametrize(
    ("stage", "dtype", "gas"),
    tiered([(2, "bf16", 1), (1, "fp32", 2), (3, "bf16", 1)], (1, "fp32", 2), (3, "bf16", 1)),
)
def test_skipped_steps_leave_no_trace(two_ranks: Any, stage: int, dtype: str, gas: int) -> None:
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 20}}
    config = ds_config(stage=stage, dtype=dtype, gas=gas, clip=0.5, grass=probing(), scheduler=warmup)
    config["zero_optimization"].update(RELEASED)  # or gathered weights would count as memory of the step
    steps = PROBE + REFRESH + 1
    clean = two_ranks.run(train_around, config=config, steps=steps, bad_before=set())
    skipped = two_ranks.run(train_around, config=config, steps=steps, bad_before=BAD_STEPS)
    assert difference(clean, skipped) is None


def break_for_long(config: dict[str, Any], allowed: int) -> bool:
    """As many broken steps as are forgiven, one good one, as many again, and one more, which must raise."""
    model = tiny_llama(hidden=HIDDEN, layers=2)
    with engine_of(config, model) as engine:
        for start in (0, allowed):
            with broken_gradients(model):
                train(engine, allowed, start=start)
            if start == 0:
                train(engine, 1, start=500)
        weights = snapshot(model)
        with broken_gradients(model), pytest.raises(FloatingPointError, match=f"{allowed + 1} steps in a row"):
            train(engine, 1, start=1000)
        return difference(weights, snapshot(model)) is None


@pytest.mark.parametrize("sampler", ["cyclic", "grass"])
def test_gradients_that_stay_broken_stop_all_ranks(two_ranks: Any, sampler: str) -> None:
    config = ds_config(dtype="bf16", grass=probing(sampler=sampler))
    assert two_ranks.run(break_for_long, config=config, allowed=20) == [True, True]
