# SPDX-License-Identifier: Apache-2.0
"""Scores and probabilities: the paper's formula, its safety at the edges of float64, refusal of broken numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grass_ds.sampling.importance import Importance, sampling_logits, softmax

NORMALIZATIONS = ("mean", "none")

scores_lists = st.lists(st.floats(0.0, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
temperatures = st.floats(1e-300, 1e300)


def probabilities(scores, temperature, normalization):
    return softmax(sampling_logits(scores, temperature, normalization))


@given(scores_lists, temperatures, st.sampled_from(NORMALIZATIONS))
def test_probabilities_sum_to_one_and_keep_the_order_of_any_finite_scores(scores, temperature, normalization):
    p = probabilities(scores, temperature, normalization)
    assert math.fsum(p) == pytest.approx(1.0, abs=1e-12)
    ordered = [p[i] for i in sorted(range(len(scores)), key=scores.__getitem__)]
    assert ordered == sorted(ordered)
    assert ordered[0] >= 0.0 and ordered[-1] <= 1.0


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_probabilities_are_the_papers_softmax(normalization):
    scores, temperature = [0.1, 0.4, 0.25], 0.5
    scale = sum(scores) / 3 if normalization == "mean" else 1.0
    weights = [math.exp(m / scale / temperature) for m in scores]
    expected = [w / sum(weights) for w in weights]
    assert probabilities(scores, temperature, normalization) == pytest.approx(expected, rel=1e-12)
    assert probabilities([0.0] * 4, 1.0, normalization) == (0.25,) * 4


def test_mean_normalization_ignores_the_unit_of_the_scores_and_none_does_not():
    scores = [1e-4, 3e-4, 2e-4]
    scaled = [1e6 * m for m in scores]
    assert probabilities(scores, 1.0, "mean") == pytest.approx(probabilities(scaled, 1.0, "mean"), rel=1e-9)
    assert max(probabilities(scores, 1.0, "none")) < 0.334  # raw gradient norms barely leave uniform
    assert max(probabilities(scaled, 1.0, "none")) > 0.99


def test_an_update_takes_means_first_and_weighs_the_new_measurement_by_alpha_later():
    importance = Importance(3)
    importance.add_measurements({0: 1.0, 1: 2.0, 2: 3.0}, (0, 1, 2))
    importance.add_measurements({0: 3.0, 1: 2.0, 2: 5.0}, (0, 1, 2))
    assert importance.scores is None
    importance.update_scores(lambda updates: 0.25)
    assert importance.scores == (2.0, 2.0, 4.0)
    importance.add_measurements({2: 8.0}, (2,))
    importance.add_measurements({1: 6.0, 2: 16.0}, (1, 2))
    importance.update_scores(lambda updates: 0.25)
    assert importance.scores == (2.0, 0.25 * 6 + 0.75 * 2, 0.25 * 12 + 0.75 * 4)
    importance.update_scores(lambda updates: 0.25)
    assert importance.scores == (2.0, 3.0, 6.0)


@pytest.mark.parametrize(
    "rms",
    [
        *({0: 1.0, 1: broken} for broken in (math.nan, math.inf, -math.inf, -1e-9)),
        {0: 1.0},
        {0: 1.0, 1: 1.0, 2: 1.0},
        None,
    ],
)
def test_a_refused_measurement_leaves_nothing_behind(rms):
    importance = Importance(3)
    before = importance.state_dict()
    with pytest.raises(ValueError, match=r"layer 1 is (nan|-?inf|-1e-09)|wanted for layers \[0, 1\]"):
        importance.add_measurements(rms, (0, 1))
    assert importance.state_dict() == before
