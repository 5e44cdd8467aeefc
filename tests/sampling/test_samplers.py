# SPDX-License-Identifier: Apache-2.0
"""Draws: distinct layers, the right distribution, the same in any process, faithful resume."""

import math
import re
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grass_ds.sampling.importance import softmax
from grass_ds.sampling.registry import SAMPLERS
from grass_ds.sampling.samplers import SamplingSettings, draw_without_replacement

NAMES = sorted(SAMPLERS)
CYCLIC_ORDERS = ("random", "ascending", "descending")
SETTINGS = {"temperature": 1.0, "score_normalization": "mean", "cyclic_order": "random", "seed": 42}
TIMES = {"probe_steps": 1, "sample_period": 1, "refresh_period": 1, "reprobe_period": 0, "ema_alpha": 0.5}


def make(name, layers, gamma, **kwargs):
    budget = {"module_budget": min((gamma + 0.5) / layers, 1.0)}  # matrices of one size
    settings = SamplingSettings(sampler=name, num_active_layers=gamma, **{**TIMES, **SETTINGS, **budget, **kwargs})
    return SAMPLERS[name](layers, settings)


cases = st.integers(1, 12).flatmap(
    lambda layers: st.tuples(
        st.just(layers),
        st.integers(1, layers + 2),
        st.lists(st.floats(0.0, 1e300), min_size=layers, max_size=layers),
        st.integers(0, 2**63 - 1),
        st.sampled_from(CYCLIC_ORDERS),
    )
)


@pytest.mark.parametrize("name", NAMES)
@given(case=cases, temperature=st.sampled_from([1e-9, 0.3, 1e9]))
def test_no_layer_is_drawn_twice_and_probabilities_sum_to_one(name, case, temperature):
    layers, gamma, scores, seed, order = case
    sampler = make(name, layers, gamma, seed=seed, cyclic_order=order, temperature=temperature)
    for _ in range(4):
        drawn = sampler.draw(scores)
        assert drawn == tuple(sorted(set(drawn)))
        assert set(drawn) <= set(range(layers))
        assert len(drawn) == (layers if name == "full" else min(gamma, layers))
        assert sum(sampler.probabilities(scores)) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
@given(case=cases, before=st.integers(0, 5))
def test_state_restores_the_coming_draws(name, case, before):
    layers, gamma, scores, seed, order = case
    first = make(name, layers, gamma, seed=seed, cyclic_order=order)
    for _ in range(before):
        first.draw(scores)
    second = make(name, layers, gamma, seed=(seed + 1) % 2**63, cyclic_order=order)
    second.load_state_dict(first.state_dict())
    assert [first.draw(scores) for _ in range(6)] == [second.draw(scores) for _ in range(6)]


def test_sequential_draws_follow_the_exact_distribution_of_ordered_draws():
    logits = (0.0, 1.0, -0.5)
    generator = torch.Generator().manual_seed(0)
    runs = 6000
    counts = Counter(tuple(draw_without_replacement(logits, 2, generator)) for _ in range(runs))
    p = softmax(logits)
    for i, j in permutations(range(3), 2):
        expected = p[i] * p[j] / (1 - p[i])
        assert counts[i, j] / runs == pytest.approx(expected, abs=0.025)  # four standard deviations at most


def test_layers_of_underflowing_probability_are_still_drawn_by_their_own_order():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert draw_without_replacement((0.0, -4000.0, -2000.0, -9000.0), 3, generator) == [0, 2, 1]


ratios = st.lists(st.floats(1e-6, 50.0) | st.just(0.0), min_size=2, max_size=12)


@given(ratios=ratios, seed=st.integers(0, 2**40), gamma=st.integers(1, 12))
def test_outlier_draws_by_the_share_of_outliers_without_replacement(ratios, seed, gamma):
    """Against p = D / sum D with the drawn layers taken out, as ``numpy.random.choice(replace=False, p=p)`` has it."""
    gamma = min(gamma, len(ratios))
    sampler = make("outlier", len(ratios), gamma, seed=seed)
    p = np.array(ratios) / sum(ratios) if any(ratios) else np.full(len(ratios), 1 / len(ratios))
    assert sampler.probabilities(ratios) == pytest.approx(list(p), rel=1e-12)
    generator = torch.Generator().manual_seed(seed)
    expected = set()
    for _ in range(gamma):
        left = [layer for layer in range(len(ratios)) if layer not in expected]
        weights = p[left] if p[left].any() else np.ones(len(left))  # only layers without outliers are left
        shares = np.cumsum(weights / weights.sum())
        point = torch.rand((), generator=generator, dtype=torch.float64).item()
        expected.add(left[int(np.searchsorted(shares, point, side="right"))])
    assert sampler.draw(ratios) == tuple(sorted(expected))


def test_layers_without_outliers_are_drawn_last_and_alike():
    sampler = make("outlier", 5, 3, seed=1)
    drawn = [sampler.draw([0.0, 1e-9, 0.0, 50.0, 0.0]) for _ in range(300)]
    assert all({1, 3} < set(layers) for layers in drawn)
    counts = Counter(layer for layers in drawn for layer in layers if layer not in (1, 3))
    assert set(counts) == {0, 2, 4} and min(counts.values()) > 70


matrices = st.integers(1, 9).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 40), min_size=count, max_size=count),
        st.lists(st.floats(0.0, 3.0), min_size=count, max_size=count),
    )
)


@given(
    matrices=matrices, budget=st.floats(0.0, 1.0), seed=st.integers(0, 2**40), temperature=st.sampled_from([0.1, 1.0])
)
def test_module_draws_by_the_papers_rule(matrices, budget, seed, temperature):
    """Against MISA step by step: p ~ exp(min(5, eta G^2)), the forced ones first, until the budget is used up."""
    sizes, rms = matrices
    budget = max(budget, max(sizes) / sum(sizes) + 1e-9)
    kwargs = {"module_budget": budget, "sizes": sizes, "seed": seed, "temperature": temperature}
    sampler = make("module", len(sizes), 1, **kwargs)
    norms = [value * math.sqrt(size) for value, size in zip(rms, sizes, strict=True)]
    p = np.exp([min(5.0, norm**2 / temperature) for norm in norms])
    assert sampler.probabilities(rms) == pytest.approx(list(p / p.sum()), rel=1e-9)
    generator = torch.Generator().manual_seed(seed)
    last_used = [-1] * len(sizes)
    for switch in range(12):
        unused = [b for b in range(len(sizes)) if last_used[b] == -1]
        oldest = sorted(range(len(sizes)), key=lambda b: (last_used[b], b))[:2]
        order = [*unused, *(b for b in oldest if b not in unused)]
        rest = [b for b in range(len(sizes)) if b not in order]
        active, left = [], budget * sum(sizes)
        for b in order:
            if sizes[b] <= left:
                active.append(b)
                left -= sizes[b]
        while rest := [b for b in rest if sizes[b] <= left]:
            shares = np.cumsum(p[rest] / p[rest].sum())
            point = torch.rand((), generator=generator, dtype=torch.float64).item()
            active.append(rest.pop(min(int(np.searchsorted(shares, point, side="right")), len(rest) - 1)))
            left -= sizes[active[-1]]
        assert sampler.draws_next == bool(unused)
        assert sampler.draw(rms) == tuple(sorted(active))
        assert 1 <= len(active) <= sampler.most_active
        for b in active:
            last_used[b] = switch
    assert len(sizes) > 12 or -1 not in last_used  # each draw has a new matrix until none is left


def test_modules_average_is_corrected_for_its_start():
    """G_n = (1 - beta) sum_k beta^(n - k) x_k / (1 - beta^n), as Adam corrects its moments."""
    beta, values = 0.8, [1.0, 3.0, 0.5, 2.0]
    sampler, score = make("module", 1, 1, ema_alpha=1 - beta), 0.0
    for n, value in enumerate(values, 1):
        weight = sampler.ema_weight(n - 1)
        score = weight * value + (1 - weight) * score
        expected = (1 - beta) * sum(beta ** (n - k) * x for k, x in enumerate(values[:n], 1)) / (1 - beta**n)
        assert score == pytest.approx(expected, rel=1e-12)


def test_module_refuses_a_budget_below_its_largest_matrix():
    make("module", 3, 1, sizes=[2, 4, 2], module_budget=0.5)
    with pytest.raises(ValueError, match=r"module_budget = 0.49: the largest matrix has 0.5 of"):
        make("module", 3, 1, sizes=[2, 4, 2], module_budget=0.49)


@given(
    layers=st.integers(1, 9),
    losses=st.lists(st.tuples(*[st.floats(0.0, 12.0)] * 3), min_size=1, max_size=4),
    seed=st.integers(0, 2**40),
)
def test_ist_learns_and_draws_by_the_papers_rule(layers, losses, seed):
    """Against IST step by step: sigmoid(I) for trials, I += lr r s (1 - s) for their layers, sigmoid(-I) for training."""
    sampler, generator = make("ist", layers, 1, seed=seed), torch.Generator().manual_seed(seed)
    importance = np.zeros(layers)

    def multinomial(weights, count):
        left, drawn = list(range(layers)), []
        for _ in range(count):
            shares = np.cumsum(weights[left] / weights[left].sum())
            point = torch.rand((), generator=generator, dtype=torch.float64).item()
            drawn.append(left.pop(min(int(np.searchsorted(shares, point, side="right")), len(left) - 1)))
        return tuple(sorted(drawn))

    for measured in losses:
        s = 1 / (1 + np.exp(-importance))
        sets = []
        for _ in range(20):
            drawn = multinomial(s, max(int(0.5 * layers), 1))
            sets += [drawn] if drawn not in sets else []
            if len(sets) == 3:
                break
        measured = measured[: len(sets)]
        assert sampler.trials() == sets
        sampler.learn(sets, measured)
        rewards = np.exp(-np.array(measured)) - np.exp(-np.array(measured)).mean()
        for chosen, reward in zip(sets, rewards, strict=True):
            for layer in chosen:
                importance[layer] += reward * s[layer] * (1 - s[layer]) * 10
        assert sampler.learned == pytest.approx(tuple(importance), rel=1e-9, abs=1e-12)
        p = 1 / (1 + np.exp(importance))
        assert sampler.probabilities(None) == pytest.approx(list(p / p.sum()), rel=1e-9)
        assert sampler.draw(None) == multinomial(p, 1)


def test_an_adaptive_sampler_measures_gradients():
    class Adaptive(SAMPLERS["outlier"]):
        adaptive = True

    with pytest.raises(ValueError, match="only gradients are measured while training"):
        Adaptive(4, make("outlier", 4, 1).settings)


def test_scores_decide_the_grass_draw_and_not_the_uniform_one():
    scores = [1e-6, 1e-6, 5.0, 1e-6]
    kwargs = {"temperature": 0.01, "seed": 3}
    assert {make("grass", 4, 1, **kwargs).draw(scores) for _ in range(5)} == {(2,)}
    uniform = make("uniform", 4, 1, **kwargs)
    assert {uniform.draw(scores) for _ in range(100)} == {(0,), (1,), (2,), (3,)}


@pytest.mark.parametrize("name", ["uniform", "grass", "static", "outlier", "ist"])
@given(case=cases)
def test_stratified_takes_one_layer_of_each_part_of_the_depth(name, case):
    layers, gamma, scores, seed, _ = case
    sampler = make(name, layers, gamma, seed=seed, stratified=True)
    parts = min(gamma, layers)
    part_of = [part for part in range(parts) for _ in range(part * layers // parts, (part + 1) * layers // parts)]
    assert len(part_of) == layers
    for _ in range(4):
        assert [part_of[layer] for layer in sampler.draw(scores)] == [*range(parts)]
    chances = sampler.probabilities(scores)
    for part in range(parts):
        inside = [chances[layer] for layer in range(layers) if part_of[layer] == part]
        assert sum(inside) == pytest.approx(1 / parts, abs=1e-12)


def test_inside_a_part_the_samplers_chances_hold():
    """5 layers in 2 parts; the difference of two scores decides, whatever the others are."""
    sampler = make("grass", 5, 2, score_normalization="none", stratified=True)
    scores, runs = [0.0, 1.0, 7.0, 0.0, 7.5], 4000
    draws = Counter(layer for _ in range(runs) for layer in sampler.draw(scores))
    expected = [*softmax(scores[:2]), *softmax(scores[2:])]
    assert sampler.probabilities(scores) == pytest.approx([chance / 2 for chance in expected])
    for layer, chance in enumerate(expected):  # six standard deviations of a binomial
        assert abs(draws[layer] - runs * chance) <= 6 * math.sqrt(runs * chance * (1 - chance)) + 1e-9


@pytest.mark.parametrize("name", ["cyclic", "module", "full"])
def test_stratified_is_refused_where_a_draw_has_other_rules(name):
    with pytest.raises(ValueError, match=f"stratified: sampler {name} draws by rules of its own; leave it out"):
        make(name, 4, 2, stratified=True)


@pytest.mark.parametrize("order", CYCLIC_ORDERS)
@given(layers=st.integers(2, 9), gamma=st.integers(1, 8), seed=st.integers(0, 1000))
def test_cyclic_trains_every_layer_equally_often(order, layers, gamma, seed):
    gamma = min(gamma, layers - 1)
    sampler = make("cyclic", layers, gamma, cyclic_order=order, seed=seed)
    visits = Counter()
    for drawn in range(1, 3 * layers + 1):
        visits.update(sampler.draw(None))
        counts = [visits[i] for i in range(layers)]
        assert max(counts) - min(counts) <= 1 + (drawn * gamma % layers != 0)
    assert set(visits.values()) == {3 * gamma}


@given(
    order=st.lists(st.integers(0, 9), min_size=3, max_size=10, unique=True),
    gamma=st.integers(1, 3),
    before=st.integers(0, 12),
)
def test_a_given_order_is_followed_and_resumed(order, gamma, before):
    """Layers in turn, those that it leaves out never: a literal queue. Resumed, the draws go on."""
    sampler = make("cyclic", 10, gamma, cyclic_order=order)
    assert sampler.probabilities(None) == tuple((layer in order) / len(order) for layer in range(10))
    drawn = [sampler.draw(None) for _ in range(before)]
    resumed = make("cyclic", 10, gamma, cyclic_order=order)
    resumed.load_state_dict(sampler.state_dict())
    drawn += [resumed.draw(None) for _ in range(12)]
    times = Counter(layer for layers in drawn for layer in layers)
    assert set(times) <= set(order) and all(len(set(layers)) == gamma for layers in drawn)
    assert max(times[layer] for layer in order) - min(times[layer] for layer in order) <= 1
    if gamma == 1:
        assert [layer for (layer,) in drawn] == [order[i % len(order)] for i in range(before + 12)]


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 10]], ids=["too few", "twice", "none of them"])
def test_an_order_that_cannot_work_is_refused(order):
    with pytest.raises(ValueError, match=re.escape(f"cyclic_order = {order}: name at least 2 of the layers 0 to 9")):
        make("cyclic", 10, 2, cyclic_order=order)


def test_cyclic_orders():
    def draws(order, gamma=1):
        sampler = make("cyclic", 5, gamma, cyclic_order=order)
        return [sampler.draw(None) for _ in range(5)]

    assert draws("ascending") == [(0,), (1,), (2,), (3,), (4,)]
    assert draws("descending") == [(4,), (3,), (2,), (1,), (0,)]
    assert draws("ascending", 2) == [(0, 1), (2, 3), (0, 4), (1, 2), (3, 4)]
    shuffled = make("cyclic", 8, 1, cyclic_order="random", seed=1)
    cycles = [tuple(shuffled.draw(None)[0] for _ in range(8)) for _ in range(3)]
    assert all(sorted(cycle) == list(range(8)) for cycle in cycles)
    assert len(set(cycles)) == 3


GRASS = [[1, 2], [3, 5], [4, 5], [2, 4], [3, 4], [0, 1]]
UNIFORM = [[1, 2], [3, 5], [4, 5], [1, 3], [3, 4], [0, 1]]
OUTLIER = [[2, 3], [3, 5], [4, 5], [2, 4], [3, 4], [0, 2]]
CYCLIC = [[1, 2], [3, 5], [0, 4], [1, 3], [4, 5], [0, 2]]


def test_draws_of_a_seed_are_pinned():
    """Resumed and repeated runs rely on them across releases, machines and processes: change them only on purpose."""
    scores = [0.3, 0.1, 0.7, 0.2, 0.5, 0.4]
    samplers = {name: make(name, 6, 2, seed=7) for name in NAMES}
    draws = {name: [list(sampler.draw(scores)) for _ in range(6)] for name, sampler in samplers.items()}
    assert draws["grass"] == draws["static"] == GRASS
    assert draws["outlier"] == OUTLIER
    assert draws["uniform"] == UNIFORM
    assert draws["cyclic"] == CYCLIC
