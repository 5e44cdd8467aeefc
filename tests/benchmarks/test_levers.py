# SPDX-License-Identifier: Apache-2.0
"""Suite ``levers``: its draws, its cases, and differences at equal seeds."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.markdown import lines_under

from benchmarks.case import Case, Request
from benchmarks.levers import suite, tables
from benchmarks.levers.draws import WeightedSampler, WindowSampler
from benchmarks.levers.suite import BASE, GAMMA, LONG, PERIODS, RAMP, RATE, Lever
from benchmarks.methods import grass_config
from benchmarks.quality.suite import SEEDS, STEPS
from benchmarks.quality.training import _ramp
from grass_ds.config import GrassConfig
from grass_ds.sampling.samplers import SamplingSettings

MEASURED = {"kind": "scores", "rms": [1.0, 3.0] * 15, "l1": [3.0, 1.0] * 15}


def settings(count: int, **arguments: Any) -> SamplingSettings:
    given = GrassConfig(num_active_layers=count, seed=3).controller_arguments()
    return SamplingSettings(**{**given, "sampler_args": arguments})


def test_a_window_has_neighbours_and_reaches_both_ends() -> None:
    sampler = WindowSampler(7, settings(3))
    drawn = {sampler.draw(None) for _ in range(200)}
    assert drawn == {(low, low + 1, low + 2) for low in range(5)}


def test_weights_are_chances() -> None:
    sampler = WeightedSampler(3, settings(1, weights=[1.0, 2.0, 5.0]))
    assert sampler.probabilities(None) == pytest.approx((0.125, 0.25, 0.625))
    count = Counter(sampler.draw(None)[0] for _ in range(4000))
    for layer, chance in enumerate((0.125, 0.25, 0.625)):  # five standard deviations of a binomial
        assert abs(count[layer] - 4000 * chance) < 5 * (4000 * chance * (1 - chance)) ** 0.5


def test_cases_change_one_thing() -> None:
    first = list(suite.cases(Request()))
    found = list(suite.cases(Request(rows=[MEASURED])))
    assert first[0] == found[0] == suite.MEASURED
    base = BASE.case(0)
    assert (base.method, base.lr, base.steps, base.grass["num_active_layers"]) == ("uniform", RATE, STEPS, GAMMA)
    short = [case for case in found if case.steps == STEPS]
    assert {case.seed for case in short} == set(SEEDS)
    assert len([case for case in short if case.seed == 0]) == 6
    for case in short[:4]:
        assert Case(**{**vars(case), "method": "uniform", "grass": base.grass}) == base
    by_rms, by_l1 = (case.grass["sampler_args"]["weights"] for case in short[4:6])
    assert by_rms[0] < by_rms[1] and by_l1[0] > by_l1[1] and sum(by_rms) == pytest.approx(1)
    long = [case for case in found if case.steps == LONG and case.seed == 0]
    changed = [(case.grass["sample_period"], case.grass.get("state_on_switch"), case.ramp) for case in long]
    assert changed == [
        (period, state, ramp)
        for period in PERIODS
        for state in ("keep", "reset")
        for ramp in ((0,) if period == RAMP else (0, RAMP))
    ]
    for case in found[1:]:
        grass_config(case)  # valid blocks


def test_the_rate_rises_again_after_a_draw() -> None:
    engine = SimpleNamespace(optimizer=SimpleNamespace(param_groups=[{"lr": 1.0}]), global_steps=0)
    factors = []
    for step in range(8):
        engine.global_steps = step
        engine.optimizer.param_groups[0]["lr"] = 1.0  # the scheduler sets it
        _ramp(engine, 2, 4)
        factors.append(engine.optimizer.param_groups[0]["lr"])
    assert factors == [0.5, 1, 1, 1, 0.5, 1, 1, 1]


def test_differences_are_from_the_base_at_equal_seeds() -> None:
    def row(lever: Lever, seed: int, loss: float) -> dict[str, Any]:
        case = lever.case(seed)
        machine = {"device": "cpu", "hardware": "any", "threads": 1, "jobs": 1, "commit": "0a", "versions": {}}
        shown = {name: getattr(case, name) for name in ("kind", "model", "dtype", "micro_batch", "sequence", "steps")}
        figures = {"test_loss": loss, "test_rows": 4, "cpu_seconds": 100.0}
        return {**shown, **machine, **figures, "ranks": 1, "seed": seed, "cell": case.text()}

    base, stratified = suite.draws([])[:2]
    period = suite.periods()[2]
    rows = [
        row(base, 0, 1.0),
        row(base, 1, 2.0),
        row(stratified, 0, 1.5),
        row(stratified, 1, 2.0),
        row(period, 1, 3.0),
    ]
    blocks = tables.tables(rows)
    assert tables.tables([]) == []
    first, second = lines_under(f"Draws, {STEPS} steps", blocks)
    assert list(first.values()) == ["uniform", "1.500 ± 0.707", "", "", "2.00", "2"]
    # 12.71 * 0.3536 / sqrt(2) to both sides
    assert list(second.values()) == ["stratified", "1.750 ± 0.354", "+0.250 ± 0.354", "-2.928 to +3.428", "2.00", "2"]
    assert lines_under(f"Periods and Adam state, {LONG} steps", blocks) == [
        {"changed": period.name, "test loss": "3.000", "CPU s / step": "0.50", "seeds": "1"}
    ]
