# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of offload and of ZeRO-3: cells run for real on a tiny model, and the tables say what the rows say."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import methods, places, render, saves, stages
from benchmarks.peers import badam_engine
from benchmarks.run import installed, run_cell
from benchmarks.suites import gpu_cells, offload_cells, zero3_cells
from grass_ds.config import OffloadConfig

TINY = "llama-tiny-random"


def cells(suite: Any, offload: str) -> dict[str, Any]:
    """The suite's cell of this variant, on the tiny model; the only one per round."""
    (cell,) = [cell for cell in suite if cell.get("offload") == offload]
    return {**cell, "model": TINY, "sequence": 16, "steps": 6}


@pytest.mark.dist
def test_offload_cells_train_the_same_layers_and_leave_nothing(tmp_path: Path) -> None:
    variants = ("none", "nvme-stream-files")
    with ThreadPoolExecutor() as pool:
        none, nvme = pool.map(lambda v: run_cell(cells(offload_cells(1), v), 300, str(tmp_path)), variants)
    assert none["active"] == nvme["active"]
    assert len({tuple(active) for active in none["active"]}) == 2  # a draw within the measured steps
    assert none["first_steps"] == nvme["first_steps"] == 0
    state = {row["offload"]: row["bytes"]["optimizer_state"] for row in (none, nvme)}
    assert state["none"]["host"] == 0
    assert state["nvme-stream-files"]["nvme"] >= state["none"]["device"] > state["nvme-stream-files"]["device"] > 0
    assert min(nvme["disk_bytes"].values()) > 0
    assert none["resident_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in json.dumps(nvme)
    assert len(places.offload_table([none, nvme])) == 4


@pytest.mark.dist
def test_gpu_cells_run_on_a_tiny_shape() -> None:
    with ThreadPoolExecutor() as pool:
        none, period = pool.map(lambda v: run_cell(cells(gpu_cells(1), v), 300), ("none", "cpu-period"))
    assert none["checkpointing"] and none["model"] == TINY
    assert none["active"] == period["active"]
    assert period["first_steps"] == 0
    assert period["bytes"]["optimizer_state"]["host"] > 0
    assert len(places.gpu_table([none, period])) == 4


@pytest.mark.dist
def test_checkpoint_cells_weigh_what_they_save(tmp_path: Path) -> None:
    tiny = {"model": TINY, "sequence": 16, "steps": 2, "ranks": 1}
    suite = [{**cell, **tiny} for cell in saves.save_cells(1) if cell["stage"] == 2]
    stock, late = (cell for cell in suite if cell["method"] == "full" or cell.get("async"))
    folders = [tmp_path / name for name in ("stock", "late")]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda cell, folder: run_cell(cell, 300, str(folder)), (stock, late), folders))
    # Weights, their fp32 values and all moments, but for those of the embeddings, which never train.
    assert 0.6 < rows[1]["checkpoint_bytes"] / rows[0]["checkpoint_bytes"] < 1
    assert [row["async"] for row in rows] == [False, True]
    assert all(0 < row["stall_seconds"] <= row["disk_seconds"] for row in rows)
    table = saves.save_table(rows)
    assert len(table) == 4
    assert "training stood still" in table[0]


@pytest.mark.dist
def test_zero3_cells_shard_and_badam_loses_the_last_step_on_every_block() -> None:
    pytest.importorskip("badam")
    tiny = {"model": TINY, "sequence": 16, "steps": 10}
    suite = {cell["method"]: {**cell, **tiny} for cell in zero3_cells(1) if cell["stage"] == 3}
    with ThreadPoolExecutor() as pool:
        uniform, badam = pool.map(lambda method: run_cell(suite[method], 300), ("uniform", "badam-package"))
    assert uniform["stage"] == badam["stage"] == 3
    assert len({tuple(active) for active in uniform["active"]}) == 2  # a draw within the measured steps
    # Two layers of six are trained, and one; sharded parameters are counted whole.
    assert 6 * badam["trainable"] > 2.5 * uniform["trainable"] > 0
    assert badam["versions"]["badam"]
    blocks = badam["active"]
    assert [len(block) for block in blocks] == [1] * 10
    switches = [step for step in range(9) if blocks[step] != blocks[step + 1]]
    assert len(switches) == 2
    assert [step for step, changed in enumerate(badam["changed"]) if not changed] == switches  # what the note says
    assert set(uniform["changed"]) == {None}
    table = stages.zero3_table([uniform, badam])
    assert len(table) == 4
    assert all(" | 3 | " in row for row in table[2:])
    assert "2 of its 10 measured steps changed no weight" in stages.zero3_note([uniform, badam])


def test_badam_is_refused_off_stage_3() -> None:
    with pytest.raises(ValueError, match="stage=2: the package badam shards under ZeRO-3 only; use --stage 3"):
        badam_engine(torch.nn.Linear(2, 2), {"zero_optimization": {"stage": 2}}, switch_every=5)


def test_without_badam_its_cells_are_skipped_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = list(zero3_cells(2))
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    left = installed(suite)
    assert [cell for cell in suite if cell not in left] == [c for c in suite if c["method"] == "badam-package"]
    assert len(suite) - len(left) == 2
    said = capsys.readouterr().out.splitlines()
    assert said == ["skipped: badam-package needs the package badam, not installed here (pip install badam)"]


def test_zero3_rounds_are_alike_and_hold_switches() -> None:
    suite = list(zero3_cells(2))
    half = len(suite) // 2
    assert [{**cell, "seed": 1} for cell in suite[:half]] == suite[half:]
    assert {cell["method"] for cell in suite} <= set(stages.LABELS) & set(methods.METHODS)
    assert all(cell["steps"] >= 3 * cell["grass"]["sample_period"] for cell in suite)


def zero3_row(method: str, stage: int, seconds: list[float], **changed: Any) -> dict[str, Any]:
    """A row as a cell of the suite writes it, as far as the table reads it."""
    parts = {"median_forward": 0.5, "median_backward": 0.25, "median_step": 0.125}
    one = {"method": method, "stage": stage, "trainable": 2_000_000, "changed": [None] * len(seconds), **parts}
    if method == "full":
        one["active"] = [None] * len(seconds)
    return row(None, seconds, **{**one, **changed})


def test_zero3_ratios_are_within_the_round() -> None:
    rows = [
        zero3_row("full", 3, [4.0, 4.0, 10.0]),
        zero3_row("grass", 3, [1.0, 1.0, 7.0]),
        zero3_row("full", 3, [2.0, 2.0, 2.0], seed=1),
        zero3_row("grass", 3, [1.0, 1.0, 1.0], seed=1),
        zero3_row("full", 2, [4.0, 4.0, 4.0], seed=2),  # in a round without its base
    ]
    full, grass, zero2 = (line.split(" | ") for line in stages.zero3_table(rows)[2:])
    assert full[3:5] == ["1.00 (1.00 to 1.00)"] * 2
    assert grass[1:] == [
        "3",
        "1.00 (1.00 to 7.00), 2.00",
        "0.38 (0.25 to 0.50)",
        "0.50 (0.50 to 0.50)",
        "0.50, 0.25, 0.12",
        "3.00 GB",
        "2.0 M",
        "0.7 |",
    ]
    assert full[-1] == " |"
    assert zero2[1] == "2" and zero2[3:5] == ["", ""]


def test_results_tell_of_zero3_once_there_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "FOLDER", tmp_path)
    assert "ZeRO-3" not in render.results()
    shared = {"grass": {"sample_period": 5}, "model": TINY, "device": "cpu", "hardware": "any", "threads": 1}
    shared |= {"commit": "0123abc", "versions": {"torch": "2", "badam": "1.4"}}
    rows = [
        zero3_row("full", 3, [4.0, 4.0], **shared),
        zero3_row("badam-package", 3, [2.0, 2.0], **{**shared, "changed": [True, False]}),
        zero3_row("full", 2, [4.0, 4.0], **shared),
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "zero3.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = render.results()
    assert "## ZeRO-3: seconds per step and memory" in text
    assert f"{TINY}, ZeRO-2 / ZeRO-3, 2 rank(s)" in text
    assert "badam 1.4, blocks in random order: 1 of its 2 measured steps changed no weight" in text


def test_variants_are_valid_and_share_their_seeds() -> None:
    suite = list(offload_cells(2))
    assert {cell["offload"] for cell in suite} == set(places.OFFLOADS) == set(places.LABELS)
    assert [cell["seed"] for cell in suite] == [0] * len(places.OFFLOADS) + [1] * len(places.OFFLOADS)
    for name, block in places.OFFLOADS.items():
        assert OffloadConfig(**block, nvme_path="/disk").device == name.split("-")[0]


def row(offload: str | None, seconds: list[float], **changed: Any) -> dict[str, Any]:
    """A row as a cell writes it, as far as the tables read it."""
    return {
        "method": "uniform",
        "offload": offload,
        "seed": 0,
        "active": [[0, 1], [0, 1], [2, 3]],
        "seconds": seconds,
        "step_seconds": [0.25, 0.5, 0.75],
        "steps": len(seconds),
        "first_steps": 0,
        "ranks": 2,
        "micro_batch": 2,
        "accumulation": 1,
        "sequence": 100,
        "peak_bytes": 3e9,
        "resident_bytes": 2e9,
        "disk_bytes": {"read": 3e6, "written": 6e6},
        "bytes": {"optimizer_state": {"device": 1_500_000, "host": 2_000_000, "nvme": 3_000_000}},
        **changed,
    }


def test_ratios_compare_the_same_step_of_the_same_layers() -> None:
    base = [row("none", [1.0, 2.0, 4.0]), row("none", [1.0, 1.0, 1.0], seed=1)]
    mine = [
        row("cpu-stream", [3.0, 1.0, 1.0], seed=1),
        row("cpu-stream", [2.0, 2.0, 4.0], step_seconds=[0.5, 0.5, 2.0]),
    ]
    assert places.step_ratios(mine, base) == [[2.0, 1.0, 1.0], [3.0, 1.0, 1.0]]
    line = places.offload_table([*base, *mine])[-1].split(" | ")
    assert line[3:5] == ["1.000 (1.000 to 1.000)", "1.300"]  # 13 s against 10 s
    assert line[5:7] == ["500 ms", "+250 ms = +15.0%"]  # 0.5 s in one of two rounds, of 10 s in six steps
    assert line[7:] == ["2.00 (3.00) GB", "1.5, 2.0, 3.0 MB", "1.0, 2.0 MB |"]


@pytest.mark.parametrize("changed", [{"active": [[0, 1], [0, 1], [0, 3]]}, {"seed": 1}])
def test_other_layers_have_no_ratio(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="did not train the same layers"):
        places.step_ratios([row("cpu-stream", [1.0, 1.0, 1.0], **changed)], [row("none", [1.0, 1.0, 1.0])])


def test_a_cell_that_did_not_fit_is_named() -> None:
    skipped = {"method": "full", "offload": None, "skipped": "out of memory on a device of 80 GB"}
    table = places.gpu_table([skipped, row("none", [1.0, 2.0, 3.0])])
    assert table[2].startswith("| full | as by default | skipped: out of memory on a device of 80 GB |")
    assert " | 200 | 3.00 GB | " in table[3]  # 2 x 2 x 100 tokens in 2 s
    assert len({line.count("|") for line in table}) == 1
