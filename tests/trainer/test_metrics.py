# SPDX-License-Identifier: Apache-2.0
"""Scalars for dashboards and log lines, and the clock of the throughput."""

from types import SimpleNamespace

import pytest
import torch

from grass_ds.trainer import throughput as throughput_module
from grass_ds.trainer.metrics import grass_metrics, grass_summary
from grass_ds.trainer.throughput import Throughput

LAYERS = ("model.layers.0", "model.layers.1", "model.layers.2")


def fake_grass(**changes: object) -> SimpleNamespace:
    memory = {
        "weights": {"device": 100, "host": 0},
        "gradients": {"device": 30, "host": 0},
        "optimizer_state": {"device": 40, "host": 80},
    }
    values = {
        "phase": "train",
        "layers": LAYERS,
        "active_layers": (1,),
        "scores": (0.5, 1.5, 1.0),
        "probabilities": (0.2, 0.5, 0.3),
        "visits": (4, 0, 7),
        "memory": lambda peak=False: memory,
        "checkpoint": None,
    }
    return SimpleNamespace(**{**values, **changes})


def test_metrics_hold_every_value_under_its_layer() -> None:
    metrics = grass_metrics(fake_grass())
    assert metrics == {
        "grass/phase": 1.0,
        "grass/active/00": 0.0,
        "grass/active/01": 1.0,
        "grass/active/02": 0.0,
        "grass/score/00": 0.5,
        "grass/score/01": 1.5,
        "grass/score/02": 1.0,
        "grass/prob/00": 0.2,
        "grass/prob/01": 0.5,
        "grass/prob/02": 0.3,
        "grass/visits/00": 4.0,
        "grass/visits/01": 0.0,
        "grass/visits/02": 7.0,
        "grass/bytes/weights/device": 100.0,
        "grass/bytes/weights/host": 0.0,
        "grass/bytes/gradients/device": 30.0,
        "grass/bytes/gradients/host": 0.0,
        "grass/bytes/optimizer_state/device": 40.0,
        "grass/bytes/optimizer_state/host": 80.0,
    }
    assert all(type(value) is float for value in metrics.values())


def test_metrics_while_probing_have_no_scores() -> None:
    metrics = grass_metrics(fake_grass(phase="probe", active_layers=(0, 1, 2), scores=None))
    assert metrics["grass/phase"] == 0.0
    assert [metrics[f"grass/active/0{i}"] for i in range(3)] == [1.0, 1.0, 1.0]
    assert not any(key.startswith("grass/score/") for key in metrics)


def test_the_summary_is_as_short_for_a_deep_model() -> None:
    values = (0.01,) * 100
    deep = {"layers": tuple(map(str, range(100))), "scores": values, "probabilities": values, "visits": values}
    expected = {"grass/phase": 1.0, "grass/bytes/device": 170.0, "grass/bytes/host": 80.0}
    assert grass_summary(fake_grass()) == expected | {"grass/active_layers": "1"}
    assert grass_summary(fake_grass(**deep, active_layers=(17, 3))) == expected | {"grass/active_layers": "3 17"}
    probing = grass_summary(fake_grass(phase="probe", active_layers=(0, 1, 2)))
    assert (probing["grass/phase"], probing["grass/active_layers"]) == (0.0, "all")


def test_the_last_checkpoint_is_reported() -> None:
    report = SimpleNamespace(stall_seconds=0.5, bytes=1000)
    stall, size = {"grass/checkpoint/stall_seconds": 0.5}, {"grass/checkpoint/bytes": 1000.0}
    for values, more in ((grass_summary, stall), (grass_metrics, stall | size)):
        assert values(fake_grass(checkpoint=report)) == values(fake_grass()) | more


@pytest.mark.parametrize(("num_layers", "last"), [(10, "09"), (101, "100")])
def test_layer_keys_sort_in_layer_order(num_layers: int, last: str) -> None:
    numbers = tuple(range(num_layers))
    grass = fake_grass(layers=numbers, active_layers=(0,), scores=None, probabilities=numbers, visits=numbers)
    keys = [key for key in grass_metrics(grass) if key.startswith("grass/visits/")]
    assert keys == sorted(keys)
    assert keys[-1] == f"grass/visits/{last}"


def test_throughput_ignores_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput_module, "perf_counter", lambda: now[0])
    args, state = SimpleNamespace(include_num_input_tokens_seen="all", world_size=1), Seen()
    throughput = Throughput(torch.nn.Linear(1, 1), state, args)
    assert throughput.interval() is None
    assert throughput.average is None
    now[0] = 2.0
    throughput.step(state.more(100))
    now[0] = 50.0  # an evaluation
    throughput.start()
    now[0] = 52.0
    throughput.step(state.more(300))
    assert throughput.interval() == 100.0
    assert throughput.interval() is None
    now[0] = 53.0
    throughput.step(state.more(600))
    assert throughput.interval() == 600.0
    assert throughput.average == 200.0


class Seen:
    """A TrainerState, of a run that goes on from a checkpoint."""

    num_input_tokens_seen = 5000

    def more(self, tokens: int) -> "Seen":
        self.num_input_tokens_seen += tokens
        return self
