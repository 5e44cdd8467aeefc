# SPDX-License-Identifier: Apache-2.0
"""The history of a run and its file."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest

from grass_ds.trainer.history import History, HistoryRow

LAYERS = ("model.layers.0", "model.layers.1", "model.layers.2")
RUN = {"layers": LAYERS, "sampler": "grass", "num_active_layers": 1}


def row(step: int, phase: str = "train", active: tuple[int, ...] = (1,), p: float = 0.5) -> HistoryRow:
    return HistoryRow(step, phase, active, (0.5, p, 0.5 - p), None if phase == "probe" else (1.0, p, 2.0))


def test_history_survives_the_file(tmp_path: Path) -> None:
    history = History.start(tmp_path / "h.jsonl", **RUN)
    rows = [row(1, "probe", (0, 1, 2)), row(2), row(3), row(4, active=(2,)), row(7, active=(2,), p=0.25)]
    for item in rows:
        history.append(item)
    loaded = History.load(history.path)
    assert loaded.rows == rows
    assert (loaded.layers, loaded.sampler, loaded.num_active_layers) == (LAYERS, "grass", 1)
    assert history.visits() == loaded.visits() == [0, 2, 2]
    lines = history.path.read_text().splitlines()
    assert lines[3] == '{"step":3}'  # unchanged fields are not written again
    assert json.loads(lines[4]) == {"step": 4, "active_layers": [2]}


def test_observe_copies_the_values() -> None:
    grass = SimpleNamespace(
        phase="train", active_layers=(1,), scores=(0.5, 1.5, 1.0), probabilities=(1 / 3, 1 / 3, 1 / 3)
    )
    observed = HistoryRow.observe(grass, 5)
    grass.active_layers = (0,)
    assert observed == HistoryRow(5, "train", (1,), (0.333333,) * 3, (0.5, 1.5, 1.0))


def test_resume_drops_what_is_trained_again(tmp_path: Path) -> None:
    history = History.start(tmp_path / "h.jsonl", **RUN)
    for step in range(1, 9):
        history.append(row(step, active=(step % 3,)))
    resumed = History.start(history.path, 5, layers=LAYERS, sampler="uniform", num_active_layers=2)
    assert [item.step for item in resumed.rows] == [1, 2, 3, 4, 5]
    resumed.append(row(6, active=(0,)))
    loaded = History.load(history.path)
    assert loaded.rows == resumed.rows
    assert (loaded.sampler, loaded.num_active_layers) == ("uniform", 2)


def test_resume_refuses_another_model(tmp_path: Path) -> None:
    History.start(tmp_path / "h.jsonl", **RUN)
    with pytest.raises(ValueError, match=r"3 layers .*, but this run has 2 layers"):
        History.start(tmp_path / "h.jsonl", 1, layers=LAYERS[:2], sampler="grass", num_active_layers=1)


def test_a_run_replaces_an_earlier_one_unless_it_resumes_it(tmp_path: Path) -> None:
    for step in (5, 0):  # without a file a resumed run starts one, too
        history = History.start(tmp_path / "h.jsonl", step, **RUN)
        history.append(row(6))
        assert [item.step for item in History.load(history.path).rows] == [6]


def test_a_line_cut_by_a_kill_is_ignored(tmp_path: Path) -> None:
    history = History.start(tmp_path / "h.jsonl", **RUN)
    history.append(row(1))
    history.append(row(2, active=(0,)))
    history.path.write_text(history.path.read_text()[:-5])
    resumed = History.start(history.path, 2, **RUN)
    assert resumed.rows == [row(1)]
    resumed.append(row(3))
    assert History.load(history.path).rows == [row(1), row(3)]


@pytest.mark.parametrize(
    ("text", "line"),
    [("", 1), ("{}\n", 1), ("not json\n", 1)]
    + [
        (json.dumps(RUN) + "\n" + damaged, 2)
        for damaged in ('{"step": 1}\n', '{"stepp": 1}\n', "[1]\n", '{"step":1}{"step":2}\n')
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "h.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"h.jsonl, line {line}: not a grass history"):
        History.load(path)


def test_a_pickled_history_goes_on(tmp_path: Path) -> None:
    history = History.start(tmp_path / "h.jsonl", **RUN)
    history.append(row(1))
    copy = pickle.loads(pickle.dumps(history))
    copy.append(row(2))
    assert History.load(history.path).rows == [row(1), row(2)]


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    num_layers = 30
    history = History.start(
        tmp_path / "h.jsonl", layers=tuple(range(num_layers)), sampler="grass", num_active_layers=2
    )
    for step in range(1, 1001):
        values = tuple((step // 50 + i + 1) / 997 for i in range(num_layers))
        active = (step // 25 % num_layers, step // 25 % 7)
        grass = SimpleNamespace(phase="train", active_layers=active, probabilities=values, scores=values)
        history.append(HistoryRow.observe(grass, step))
    assert history.path.stat().st_size < 50_000
