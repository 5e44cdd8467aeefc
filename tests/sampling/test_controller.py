# SPDX-License-Identifier: Apache-2.0
"""The phase machine: probing, draws, refreshes, switches, counters, exact resume, method changes."""

import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grass_ds.sampling.controller import FINGERPRINT_FIELDS, Controller, Switch
from grass_ds.sampling.registry import SAMPLERS
from grass_ds.sampling.schedule import Phase

NAMES = sorted(SAMPLERS)
OF_BLOCKS = [name for name in NAMES if not SAMPLERS[name].draws_weights]
DEFAULTS = {
    "sampler": "grass",
    "num_active_layers": 2,
    "probe_steps": 3,
    "sample_period": 4,
    "refresh_period": 6,
    "reprobe_period": 0,
    "temperature": 0.5,
    "ema_alpha": 0.3,
    "score_normalization": "mean",
    "cyclic_order": "random",
    "seed": 7,
    "module_budget": 0.4,  # two of six layers of one size
}


def make(num_layers=6, **kwargs):
    return Controller(num_layers, **{**DEFAULTS, **kwargs})


def measurement(controller):
    """A gradient RMS per active layer that depends on layer and step only."""
    clock = 31 * controller.step + controller.probe_step
    return {layer: random.Random(1000 * clock + layer).random() for layer in controller.active_layers}


def advance(controller, steps):
    """Run ``steps`` steps; what was seen after each."""
    seen = []
    for _ in range(steps):
        trials = controller.trials()
        if trials:
            losses = [0.1 * len(set(trials[0]) & {0, 1}), 0.2, 0.5 + 0.1 * controller.step]
            controller.learn(trials, losses[: len(trials)])
        switch = controller.end_step(measurement(controller) if controller.measuring else None)
        seen.append((switch, controller.phase, controller.active_layers, controller.scores, controller.visits))
    return seen


def saved(controller):
    """The state after a trip through the strict ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(controller.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ["grass", "static"])
def test_probing_measures_all_layers_and_trains_none(name):
    controller = make(sampler=name)
    for step in range(3):
        assert controller.phase is Phase.PROBE and controller.phase == "probe"
        assert controller.measuring and controller.scores is None
        assert controller.active_layers == (0, 1, 2, 3, 4, 5)
        assert controller.probabilities == pytest.approx((1 / 6,) * 6)
        switch = controller.end_step({layer: (layer + 1) * (step + 1) for layer in range(6)})
        assert (switch is not None) == (step == 2)
    assert controller.phase is Phase.TRAIN
    assert (controller.probe_step, controller.step, sum(controller.visits)) == (3, 0, 0)
    assert controller.scores == (2.0, 4.0, 6.0, 8.0, 10.0, 12.0)
    assert controller.probabilities[5] > controller.probabilities[0]
    assert switch.active == controller.active_layers and len(switch.active) == 2
    assert switch.activated == () and sorted(switch.deactivated + switch.active) == list(range(6))
    assert controller.measuring == (name == "grass")


def test_outliers_are_measured_once_at_the_end_of_probing():
    controller = make(sampler="outlier", reprobe_period=5)
    for step in range(3):
        assert controller.phase is Phase.PROBE and controller.scores is None
        assert controller.active_layers == (0, 1, 2, 3, 4, 5) and controller.backward_layers == (5,)
        assert controller.measuring == (step == 2)
        switch = controller.end_step({layer: 0.5 * layer for layer in range(6)} if step == 2 else None)
        assert (switch is not None) == (step == 2)
    ratios = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert controller.probabilities == pytest.approx([d / sum(ratios) for d in ratios])
    for _ in range(20):
        assert controller.phase is Phase.TRAIN and not controller.measuring and controller.scores == ratios
        assert controller.backward_layers == controller.active_layers
        controller.end_step(None)


def test_scores_of_another_signal_are_not_taken_over():
    grass, outlier = make(), make(sampler="outlier")
    for one, other in ((grass, "outlier"), (outlier, "grass"), (outlier, "static")):
        advance(one, 5)
        assert one.scores is not None
        then = make(sampler=other)
        then.load_state_dict(saved(one))
        assert (then.phase, then.probe_step, then.scores) == (Phase.PROBE, 0, None)


@pytest.mark.parametrize("name", ["uniform", "cyclic"])
def test_samplers_without_scores_train_at_once_and_never_measure(name):
    controller = make(sampler=name, probe_steps=50)
    assert controller.phase is Phase.TRAIN and len(controller.active_layers) == 2
    advance(controller, 30)
    assert (controller.step, controller.probe_step) == (30, 0)
    assert not controller.measuring and controller.scores is None
    assert controller.probabilities == pytest.approx((1 / 6,) * 6)
    controller.end_step({0: math.nan})  # a measurement nobody asked for is ignored


@pytest.mark.parametrize(
    "kwargs",
    [{"sampler": "full"}, *({"sampler": name, "num_active_layers": g} for name in OF_BLOCKS for g in (6, 99))],
)
def test_gamma_of_all_layers_is_full_training(kwargs):
    controller = make(**kwargs)
    for _ in range(13):
        assert controller.phase is Phase.TRAIN and not controller.measuring and controller.scores is None
        assert controller.active_layers == tuple(range(6))
        assert controller.end_step(None) is None
    assert controller.visits == (13,) * 6


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_switches_fall_on_sampling_periods_only_and_say_exactly_what_changed(name):
    controller = make(sampler=name, refresh_period=3)
    while controller.phase is Phase.PROBE:
        advance(controller, 1)
    expected_visits = [0] * 6
    for step in range(1, 41):
        before = controller.active_layers
        for layer in before:
            expected_visits[layer] += 1
        ((switch, _, active, _, visits),) = advance(controller, 1)
        assert visits == tuple(expected_visits)
        if step % 4:
            assert switch is None and active == before
        elif set(active) == set(before):
            assert switch is None
        else:
            gone, new = sorted(set(before) - set(active)), sorted(set(active) - set(before))
            assert switch == Switch(active, tuple(new), tuple(gone))
    assert controller.step == 40


def test_refresh_moves_only_layers_active_since_the_last_one_by_the_ema_of_their_mean():
    controller = make(sample_period=2, refresh_period=4, ema_alpha=0.25)
    for _ in range(3):
        controller.end_step(dict.fromkeys(range(6), 1.0))
    measured: dict[int, list[float]] = {}
    for step in range(1, 5):
        rms = {layer: 10.0 * step + layer for layer in controller.active_layers}
        for layer, value in rms.items():
            measured.setdefault(layer, []).append(value)
        assert controller.scores == (1.0,) * 6
        controller.end_step(rms)
    expected = [0.25 * sum(v) / len(v) + 0.75 if (v := measured.get(layer)) else 1.0 for layer in range(6)]
    assert controller.scores == pytest.approx(expected, rel=1e-15)
    assert any(m != 1.0 for m in controller.scores)


def test_a_refresh_goes_before_the_draw_it_shares_a_step_with():
    controller = make(num_layers=2, num_active_layers=1, probe_steps=1, sample_period=1, refresh_period=1,
                      ema_alpha=1.0, temperature=1e-6)  # fmt: skip
    controller.end_step({0: 1.0, 1: 2.0})
    assert controller.active_layers == (1,)
    assert controller.end_step({1: 0.5}) == Switch((0,), (0,), (1,))


# ---- probing again --------------------------------------------------------------------------------------------------


def test_probing_again_measures_all_layers_anew_trains_none_and_draws():
    controller = make(reprobe_period=5, ema_alpha=0.25)
    advance(controller, 3)
    (*_, (switch, phase, active, scores, visits)) = advance(controller, 5)
    assert (phase, active, controller.probe_step) == (Phase.PROBE, tuple(range(6)), 0)
    assert switch.active == active and switch.deactivated == ()
    assert len(switch.activated) == 4
    for step in range(3):
        assert controller.measuring and controller.scores == scores  # they hold until the new ones are there
        draws = controller.draws
        switch = controller.end_step({layer: (6 - layer) * (step + 1) for layer in range(6)})
        assert (controller.step, controller.probe_step, controller.visits) == (5, step + 1, visits)
        assert (controller.draws > draws) == (switch is not None) == (step == 2)
    # the plain means: nothing is left of the old scores, nor of what the steps since the last refresh measured
    assert controller.scores == (12.0, 10.0, 8.0, 6.0, 4.0, 2.0)
    assert controller.phase is Phase.TRAIN and len(controller.active_layers) == 2
    assert sorted(switch.deactivated + switch.active) == list(range(6))


def test_probing_again_comes_after_each_period_and_goes_before_draw_and_refresh():
    controller = make(sample_period=2, refresh_period=2, reprobe_period=4)
    phases = [phase for _, phase, *_ in advance(controller, 3 + 3 * (4 + 3))]
    expected = [Phase.PROBE] * 2 + ([Phase.TRAIN] * 4 + [Phase.PROBE] * 3) * 3 + [Phase.TRAIN]
    assert phases == expected
    assert controller.step == 12
    assert controller.draws == 1 + 3 * 2  # one in the middle of each period, one after each probing
    assert controller.probe_steps_within(3 + 3 * 7) == 3 + 3 * 3


@pytest.mark.parametrize(
    ("other", "left"),
    [({"reprobe_period": 0}, 2), ({"probe_steps": 2}, 1), ({"sampler": "static"}, 0), ({"sampler": "uniform"}, 0)],
)
def test_a_run_saved_amid_its_second_probing_goes_on_under_other_settings(other, left):
    """A probing under way is finished, within its new length; a sampler that does not probe again trains at once, by
    the old scores."""
    run = make(reprobe_period=5)
    advance(run, 3 + 5 + 1)
    assert (run.phase, run.probe_step) == (Phase.PROBE, 1)
    then = make(**{"reprobe_period": 5, **other})
    then.load_state_dict(saved(run))
    phases = [then.phase, *(phase for _, phase, *_ in advance(then, left))]
    assert phases == [Phase.PROBE] * left + [Phase.TRAIN]
    assert (then.step, then.visits) == (5, run.visits)
    assert len(then.active_layers) == 2
    if "sampler" in other:
        assert then.scores == (run.scores if other["sampler"] == "static" else None)
    else:
        assert then.scores is not None and then.scores != run.scores


@pytest.mark.parametrize("name", [name for name in OF_BLOCKS if name not in ("grass", "ist")])
def test_only_grass_refreshes_and_probes_again(name):
    once, again = make(sampler=name), make(sampler=name, reprobe_period=2)
    assert (seen := advance(once, 30)) == advance(again, 30)
    assert len({scores for _, phase, _, scores, _ in seen if phase is Phase.TRAIN}) == 1
    assert again.probe_step == again.probe_steps_within(30) == once.probe_steps_within(30)
    assert again.probe_steps_within(30) == (3 if name in ("static", "outlier") else 0)


def test_module_trains_every_matrix_for_one_step_and_then_for_whole_periods():
    """Its scores are means over active periods, with the weight of a moving average that is corrected for its start."""
    controller = make(sampler="module", ema_alpha=0.2, reprobe_period=3)
    assert controller.phase is Phase.TRAIN and controller.scores is None and controller.probe_steps_within(30) == 0
    sums, counts, updates, expected = [0.0] * 6, [0] * 6, [0] * 6, [0.0] * 6
    for step in range(1, 41):
        active = controller.active_layers
        assert len(active) == 2 and controller.measuring
        if step <= 3:
            assert active == (2 * step - 2, 2 * step - 1)
        measured, before = measurement(controller), saved(controller)
        assert (controller.upcoming() is not None) == (step < 3 or step % 4 == 0)
        assert str(saved(controller)) == str(before)  # asking decides nothing
        switch = controller.end_step(measured)
        for layer, rms in measured.items():
            sums[layer] += rms
            counts[layer] += 1
        if step < 3 or step % 4 == 0:
            for layer in active:
                weight = 0.2 / (1 - 0.8 ** (updates[layer] + 1))
                expected[layer] = weight * sums[layer] / counts[layer] + (1 - weight) * expected[layer]
                sums[layer], counts[layer], updates[layer] = 0.0, 0, updates[layer] + 1
            assert controller.scores == pytest.approx(tuple(expected), rel=1e-12)
        else:
            assert switch is None and controller.active_layers == active
    assert min(controller.visits) > 0


def test_trials_come_with_the_refresh_and_nothing_else_changes_the_scores():
    controller = make(sampler="ist", refresh_period=3)
    for step in range(1, 20):
        before, trials = controller.scores, controller.trials()
        assert len(trials) == (3 if step % 3 == 0 else 0)
        if trials:
            for broken in (math.nan, math.inf):
                with pytest.raises(ValueError, match="not all are finite"):
                    controller.learn(trials, [1.0, broken, 1.0])
            assert controller.scores == before
            controller.learn(trials, [0.1, 0.2, 0.3])
        assert (not controller.measuring and controller.end_step(None) is None) or step % 4 == 0
        assert (controller.scores != before) == bool(trials)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("done", [1, 5])
def test_a_broken_measurement_names_the_layer_and_is_not_counted(broken, done):
    controller = make()
    advance(controller, done)
    before = controller.fingerprint(), controller.visits
    rms = measurement(controller)
    rms[controller.active_layers[-1]] = broken
    with pytest.raises(ValueError, match=f"layer {controller.active_layers[-1]} is {broken}"):
        controller.end_step(rms)
    with pytest.raises(ValueError, match="wanted for layers"):
        controller.end_step(None)
    assert (controller.fingerprint(), controller.visits) == before


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40)
@given(
    cut=st.integers(0, 30),
    periods=st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(0, 8)),
    order=st.sampled_from(["random", "ascending", "descending"]),
    seed=st.integers(0, 2**40),
)
def test_resume_at_any_step_goes_on_exactly(name, cut, periods, order, seed):
    kwargs = dict(zip(("probe_steps", "sample_period", "refresh_period", "reprobe_period"), periods, strict=True))
    kwargs |= {"sampler": name, "cyclic_order": order}
    straight = make(seed=seed, **kwargs)
    advance(straight, cut)
    resumed = make(seed=seed + 1, **kwargs)
    resumed.load_state_dict(saved(straight))
    assert resumed.fingerprint() == straight.fingerprint()
    assert resumed.visits == straight.visits and resumed.probabilities == straight.probabilities
    assert advance(resumed, 20) == advance(straight, 20)
    assert resumed.fingerprint() == straight.fingerprint()


def test_two_controllers_with_equal_inputs_agree_and_global_seeds_do_not_matter():
    torch.manual_seed(1)
    one = advance(make(), 40)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert advance(make(), 40) == one
    assert torch.equal(torch.random.get_rng_state(), state)
    assert advance(make(seed=8), 40) != one


def fingerprints_of_a_run():
    """The fingerprint of every sampler after 25 steps."""
    controllers = [make(sampler=name) for name in NAMES]
    return [advance(controller, 25) and list(controller.fingerprint()) for controller in controllers]


def test_a_fresh_process_reaches_the_same_fingerprint():
    program = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); from test_controller import fingerprints_of_a_run; "
        "print(json.dumps(fingerprints_of_a_run()))"
    )
    path = json.dumps([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=300, check=True
    )
    assert json.loads(done.stdout) == fingerprints_of_a_run()


def differing_fields(one, other):
    pairs = zip(FINGERPRINT_FIELDS, one.fingerprint(), other.fingerprint(), strict=True)
    return {field for field, a, b in pairs if a != b}


def test_the_fingerprint_tells_what_differs():
    def at(steps, **kwargs):
        controller = make(**kwargs)
        advance(controller, steps)
        return controller

    def edited(**changes):
        controller, state = make(), saved(at(9))
        controller.load_state_dict({**state, **changes})
        return controller

    reference = at(9)
    assert all(isinstance(n, int) and 0 <= n < 2**62 for n in reference.fingerprint())
    assert len(at(0).fingerprint()) == len(reference.fingerprint()) == len(FINGERPRINT_FIELDS)
    assert differing_fields(reference, at(9)) == set()
    assert differing_fields(at(0), at(0, seed=8)) == {"sampler"}
    assert differing_fields(at(1), at(2)) == {"probe_step", "scores"}
    state = saved(reference)
    scores = state["importance"]["scores"]
    nudged = {**state["importance"], "scores": [math.nextafter(scores[0], 9.0), *scores[1:]]}
    assert differing_fields(reference, edited(importance=nudged)) == {"scores"}
    other = next(i for i in range(6) if i not in state["active_layers"])
    assert differing_fields(reference, edited(active_layers=[other])) == {"active_layers"}
    assert differing_fields(reference, edited(step=state["step"] + 1)) == {"step"}
    assert differing_fields(reference, edited(phase="probe")) == {"phase"}


def test_a_changed_method_keeps_counters_and_scores_and_probes_only_if_it_must():
    uniform = make(sampler="uniform")
    advance(uniform, 9)
    grass = make()
    grass.load_state_dict(saved(uniform))
    assert grass.phase is Phase.PROBE and grass.active_layers == tuple(range(6))
    assert (grass.step, grass.probe_step, grass.visits) == (9, 0, uniform.visits)
    advance(grass, 3 + 5)
    assert (grass.step, grass.phase) == (14, Phase.TRAIN)

    cyclic = make(sampler="cyclic")
    cyclic.load_state_dict(saved(grass))
    assert cyclic.phase is Phase.TRAIN and cyclic.scores is None and len(cyclic.active_layers) == 2
    static = make(sampler="static")
    static.load_state_dict(saved(cyclic))
    assert static.phase is Phase.TRAIN and static.scores == grass.scores
    with pytest.raises(ValueError, match="6 layers, this model has 5"):
        make(5).load_state_dict(saved(static))
    full = make(num_active_layers=6)
    full.load_state_dict(saved(static))
    assert full.active_layers == tuple(range(6)) and full.end_step(None) is None and full.step == 15


@pytest.mark.parametrize("name", ["uniform", "full"])
def test_leaving_a_method_amid_its_probing_starts_training(name):
    grass = make()
    advance(grass, 2)
    other = make(sampler=name)
    other.load_state_dict(saved(grass))
    assert other.phase is Phase.TRAIN
    advance(other, 4)
    back = make()
    back.load_state_dict(saved(other))
    assert (back.phase, back.probe_step) == (Phase.PROBE, 0)
    for _ in range(3):
        back.end_step(dict.fromkeys(range(6), 2.0))
    assert back.scores == (2.0,) * 6  # nothing of the abandoned probing is left in the means


# ---- looking ahead --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reprobe", [0, 10])
@pytest.mark.parametrize("name", OF_BLOCKS)
def test_what_is_upcoming_comes_unless_scores_are_refreshed_first(name, reprobe):
    """Said one step before each draw of training and at no other time; wrong at most where a refresh shares the step
    with the draw. Asking decides nothing."""
    settings = {"sampler": name, "sample_period": 2, "refresh_period": 6, "reprobe_period": reprobe}
    controller, unasked = make(**settings), make(**settings)
    told = wrong = 0
    for _ in range(80):
        upcoming, phase, step = controller.upcoming(), controller.phase, controller.step
        draws = controller.draws
        assert controller.upcoming() == upcoming
        assert advance(controller, 1) == advance(unasked, 1)
        assert controller.fingerprint() == unasked.fingerprint()
        assert (upcoming is not None) == (phase is Phase.TRAIN and controller.draws > draws)
        if upcoming is not None:
            told += 1
            refreshed = name in ("grass", "ist") and (step + 1) % 6 == 0
            assert upcoming == controller.active_layers or refreshed
            wrong += upcoming != controller.active_layers
    probings = controller.step // reprobe if reprobe and name == "grass" else 0
    assert told == (0 if name == "full" else controller.step // 2 - probings)
    assert wrong < told or not told
