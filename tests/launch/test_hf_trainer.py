from types import SimpleNamespace
from typing import Any

import pytest

from launch import hf_trainer
from launch.hf_trainer import Stopwatch, TerminalLines, shown

GRASS = {"grass/phase": 1.0, "grass/active_layers": "3 17", "grass/bytes/device": 7.0}
LOGS = {"loss": 1.25, "learning_rate": 0.001, **GRASS}


def state(step: int, last: int = 4) -> Any:
    return SimpleNamespace(global_step=step, max_steps=last, is_world_process_zero=True)


def test_the_terminal_shows_which_layers_are_active(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(LOGS) == {"loss": 1.25, "learning_rate": 0.001, "active_layers": "3 17"}
    assert shown({"loss": 1.0}) == {"loss": 1.0}
    TerminalLines().on_log(None, state(2), None, logs=LOGS)
    assert capsys.readouterr().out == "step 2 of 4: loss 1.25, learning_rate 0.001, active_layers 3 17\n"


def test_the_model_is_saved_in_the_last_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Its seconds are not training, and the peak of memory is that of before."""
    now, events = [0.0], []

    def save() -> None:
        events.append("save")
        now[0] += 100.0

    monkeypatch.setattr(hf_trainer.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(hf_trainer.peak_memory, "own", lambda: events.append("peak") or 42)
    stopwatch = Stopwatch(dict, tmp_path / "before.json", save)
    stopwatch.on_train_begin(None, state(0), None)
    for step in range(1, 5):
        assert not stopwatch.saved
        now[0] += 1.0
        stopwatch.on_step_end(None, state(step), None)
    stopwatch.on_train_end()
    assert events == ["peak", "save"]
    assert stopwatch.saved
    assert (stopwatch.seconds, stopwatch.saving_seconds, stopwatch.peak_memory) == (4.0, 100.0, 42)
