# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of offload: cells run for real on a tiny model, and the tables say what the rows say."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import places
from benchmarks.run import run_cell
from benchmarks.suites import gpu_cells, offload_cells
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


def test_variants_are_valid_and_share_their_seeds() -> None:
    suite = list(offload_cells(2))
    assert {cell["offload"] for cell in suite} == set(places.OFFLOADS) == set(places.LABELS)
    assert [cell["seed"] for cell in suite] == [0] * len(places.OFFLOADS) + [1] * len(places.OFFLOADS)
    for name, block in places.OFFLOADS.items():
        assert OffloadConfig(**block, nvme_path="/disk").device == name.split("-")[0]


def row(offload: str, seconds: list[float], **changed: Any) -> dict[str, Any]:
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
