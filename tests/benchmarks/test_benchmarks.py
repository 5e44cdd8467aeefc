# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: cells run for real on a tiny model, suites hold cells that can run, and the tables say what the rows say."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import cell as cell_program
from benchmarks import costs, floors, growth, methods, places, precision, render, rowfile, saves
from benchmarks.aims import aims_table
from benchmarks.excerpts import short_table, zero3_sentence
from benchmarks.models import SHAPES, random_shape
from benchmarks.peers import badam_engine
from benchmarks.run import arguments, installed, key, run_cell
from benchmarks.suites import cpu_cells, gpu_cells, offload_cells
from grass_ds.config import GrassConfig, OffloadConfig
from grass_ds.precision import Rates

TINY = "llama-tiny-random"


def tiny(suite: Any, steps: int, **wanted: Any) -> dict[str, Any]:
    """The suite's cell of these arguments, the only one in its round, on the tiny model."""
    (cell,) = [cell for cell in suite if {**cell, **wanted} == cell]
    return {**cell, "model": TINY, "sequence": 16, "steps": steps}


@pytest.mark.dist
def test_a_cell_on_disk_moves_state_and_leaves_nothing(tmp_path: Path) -> None:
    cell = tiny(offload_cells(1), 6, offload="nvme-stream-files") | {"plain": True}
    row = run_cell(cell, "fp32", 300, str(tmp_path))
    assert len({tuple(active) for active in row["active"]}) == 2  # a draw within the measured steps
    assert row["first_steps"] == 0
    state = row["bytes"]["optimizer_state"]
    assert state["nvme"] > state["host"] > state["device"] > 0
    assert min(row["disk_bytes"].values()) > 0
    assert row["resident_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in json.dumps(row)
    assert len(places.offload_table([row])) == 3
    # Floors of fp32: 4 bytes per weight.
    weights, seen = 6 * 41_088 + 64 + 2 * 64_000, row["observed"]
    assert (row["dtype"], row["skipped_steps"]) == ("fp32", 0)
    assert row["bytes"]["weights"]["device"] == pytest.approx(4 * weights, rel=0.01)
    least = floors.memory(row, seen["active"])
    assert least["weights"] == 4 * weights
    assert seen["peak_bytes"] >= least["total"]
    moved = floors.traffic(row, seen["active"])
    assert moved["reduce_scatter"] == moved["all_gather"] == 4 * (2 * 41_088 + 64)
    assert floors.wire_bytes(seen["traffic"]) == pytest.approx(floors.wire_bytes(moved), rel=0.02)
    assert seen["flops"] == floors.flops(row, seen["active"])
    assert all(min(parts.values()) > 0 for parts in floors.seconds(row))


@pytest.mark.all
@pytest.mark.dist
def test_a_checkpoint_cell_weighs_what_it_saves(tmp_path: Path) -> None:
    cell = {**tiny(saves.save_cells(1), 2, stage=2, **{"async": True}), "ranks": 1}
    row = run_cell(cell, "bf16", 300, str(tmp_path))
    assert row["async"]
    # Weights, their fp32 values and all moments, but for those of the embeddings, which never train.
    trained, everything = 6 * 41_088 + 64, 6 * 41_088 + 64 + 2 * 64_000
    assert row["checkpoint_bytes"] == pytest.approx(2 * everything + 12 * trained + 4 * 2 * 64_000, rel=0.1)
    assert 0 < row["stall_seconds"] <= row["disk_seconds"]
    table = saves.save_table([{**row, "method": "full", "async": False, "prepare_state": False}, row])
    assert len(table) == 4
    assert "training stood still" in table[0]


@pytest.mark.all
@pytest.mark.dist
def test_badam_loses_the_last_step_on_every_block() -> None:
    pytest.importorskip("badam")
    row = run_cell({**tiny(cpu_cells(1), 10, method="badam-package"), "grass": {"sample_period": 5}}, "bf16", 300)
    adam = 12 * (41_088 // 2)
    assert row["bytes"]["weights"]["device"] > 0
    assert adam <= row["bytes"]["optimizer_state"]["device"] < 1.5 * adam
    assert row["stage"] == 3
    assert row["trainable"] == 41_088  # a sharded layer, counted whole
    blocks = row["active"]
    assert [len(block) for block in blocks] == [1] * 10
    switches = [step for step in range(9) if blocks[step] != blocks[step + 1]]
    assert len(switches) == 2
    assert [step for step, changed in enumerate(row["changed"]) if not changed] == switches
    assert f"badam {row['versions']['badam']}, blocks in random order: 2 of its 10 measured" in costs.cost_note([row])


# GFLOP/s of a CPU without bf16, a GPU with it, one without, and a CPU that refuses fp16.
EMULATES, COMPUTES = {"bf16": 1.5, "fp32": 20.0}, {"bf16": 300e3, "fp16": 290e3, "fp32": 20e3}
GPU_OF_FP16, REFUSES = {"bf16": 9e3, "fp16": 90e3, "fp32": 14e3}, {"bf16": 12.0, "fp16": 0.0, "fp32": 20.0}
FILE = Path("rows/cpu.jsonl")


@pytest.mark.parametrize(
    ("asked", "there", "gflops", "chosen", "reason"),
    [
        ("auto", None, COMPUTES, "bf16", "by what the hardware computes"),
        ("auto", None, GPU_OF_FP16, "fp16", "by what the hardware computes"),
        ("auto", None, EMULATES, "fp32", "by what the hardware computes"),
        ("auto", "fp32", COMPUTES, "fp32", "as the rows in rows/cpu.jsonl"),
        ("auto", "bf16", COMPUTES, "bf16", "as the rows in rows/cpu.jsonl"),
        ("fp16", None, COMPUTES, "fp16", "asked for by --dtype fp16"),
        ("fp32", "fp32", EMULATES, "fp32", "asked for by --dtype fp32"),
    ],
)
def test_the_precision_of_a_file_of_rows(
    asked: str, there: str | None, gflops: dict[str, float], chosen: str, reason: str
) -> None:
    rows = [] if there is None else [{"dtype": there}]
    assert precision.choose(asked, FILE, rows, Rates(gflops)) == precision.Choice(chosen, reason)


@pytest.mark.parametrize("rows", [[], [{"dtype": "bf16"}]])
def test_an_emulated_precision_that_was_asked_for_is_obeyed_with_a_warning(rows: list[dict[str, str]]) -> None:
    choice = precision.choose("bf16", FILE, rows, Rates(EMULATES), ["bf16", "fp32"])
    assert (choice.name, choice.reason) == ("bf16", "asked for by --dtype bf16")
    assert choice.warning is not None and "take 13 times as long as in fp32" in choice.warning


@pytest.mark.parametrize(
    ("asked", "there", "gflops", "said"),
    [
        (
            "auto",
            "bf16",
            EMULATES,
            "rows/cpu.jsonl holds rows of bf16: bf16 is emulated .* 13 times as long as in fp32 .* rows of fp32 .* --rows FOLDER.* --dtype bf16$",
        ),
        ("fp32", "bf16", EMULATES, "rows/cpu.jsonl holds rows of bf16, and --dtype asks for fp32.* --rows FOLDER$"),
        ("auto", "fp16", REFUSES, "rows/cpu.jsonl holds rows of fp16: fp16 does not work .* of bf16 .*--rows FOLDER$"),
        ("fp16", None, REFUSES, "--dtype fp16: fp16 does not work on this device"),
    ],
)
def test_a_precision_that_nobody_would_want_ends_the_suite(
    asked: str, there: str | None, gflops: dict[str, float], said: str
) -> None:
    rows = [] if there is None else [{"dtype": there}]
    with pytest.raises(ValueError, match=said):
        precision.choose(asked, FILE, rows, Rates(gflops), ["bf16", "fp32"])


def test_old_rows_are_of_bf16_and_a_file_holds_one_precision(tmp_path: Path) -> None:
    file = tmp_path / "quality.jsonl"
    assert rowfile.read(file) == []
    file.write_text('{"kind": "quality"}\n{"kind": "cost"}\n')
    assert [(one["dtype"], one["jobs"]) for one in rowfile.read(file)] == [("bf16", 2), ("bf16", 1)]
    file.write_text('{"kind": "quality"}\n{"kind": "quality", "dtype": "fp32"}\n')
    with pytest.raises(ValueError, match=r"quality\.jsonl: rows of bf16 and fp32"):
        rowfile.read(file)


def test_texts_name_the_precision_of_their_rows() -> None:
    rows = [cost_row("grass", 2, [1.0], dtype="fp32", threads=4)]
    assert "(any, 4 threads each), fp32, AdamW" in render.conditions(rows)
    assert "ours keeps fp32 weights and moments, 20 bytes per weight." in places.gpu_note(rows)


def test_badam_is_refused_off_stage_3() -> None:
    with pytest.raises(ValueError, match="stage=2: the package badam shards under ZeRO-3 only; use --stage 3"):
        badam_engine(torch.nn.Linear(2, 2), {"zero_optimization": {"stage": 2}}, switch_every=5)


def test_without_badam_its_cells_are_skipped_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = list(cpu_cells(2))
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    left = installed(suite)
    assert [cell for cell in suite if cell not in left] == [c for c in suite if c["method"] == "badam-package"]
    assert len(suite) - len(left) == 2
    said = capsys.readouterr().out.splitlines()
    assert said == ["skipped: badam-package needs the package badam, not installed here (pip install badam)"]


@pytest.mark.parametrize("suite", [cpu_cells, gpu_cells, offload_cells, saves.save_cells])
def test_every_cell_is_a_command_line_of_its_own(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = list(suite(2))
    assert len({key(cell) for cell in cells}) == len(cells)
    for cell in cells:
        monkeypatch.setattr(sys, "argv", ["cell.py", *arguments(cell), "--dtype", "fp16", "--out", "row.json"])
        args = cell_program.parse()
        assert (args.kind, args.method, args.grass) == (cell["kind"], cell["method"], cell.get("grass", {}))
        if methods.METHODS[args.method].grass is not None:
            GrassConfig(**args.grass)


def test_rounds_of_the_cpu_suite_are_interleaved_and_hold_what_was_asked() -> None:
    suite = [cell for cell in cpu_cells(3) if "model" not in cell]
    last = [cell for cell in suite if cell["seed"] == 2]
    assert suite[-len(last) :] == last
    assert [{**cell, "seed": 0} for cell in last] == suite[: len(last)]
    core = {(cell["method"], cell.get("stage")) for cell in last}
    assert core >= {("full", 2), ("full", 3), ("lora", 2), ("lisa-toggle", 2), ("badam-package", 3), ("grass", 3)}
    assert core >= {(method, 2) for method in ("grass", "uniform", "cyclic")}
    everything = {(cell["method"], cell["stage"]) for cell in suite if "offload" not in cell}
    assert everything >= {(method, stage) for method in ("grass", "uniform", "cyclic") for stage in (1, 2, 3)}
    assert {cell.get("accumulation", 1) for cell in suite} == {1, 4}
    assert sum("checkpointing" in cell for cell in suite) == 3
    assert {cell.get("offload") for cell in suite} == {None, "none", "nvme-stream"}


def test_gpu_cells_use_all_gpus_for_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import suites

    one = list(gpu_cells(1))
    assert {cell["ranks"] for cell in one} == {1}
    assert {cell["model"] for cell in one} == set(places.PAPER) <= set(SHAPES)
    monkeypatch.setattr(suites.get_accelerator(), "device_count", lambda: 4)
    assert {(cell["stage"], cell["ranks"]) for cell in gpu_cells(1)} == {(2, 1), (3, 4)}


@pytest.mark.parametrize(
    ("name", "numel"), [("llama2-7b-random", 6.738e9), ("tinyllama-random", 1.100e9), ("gemma-2b-random", 2.506e9)]
)
def test_shapes_have_the_published_size(name: str, numel: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(numel, rel=1e-3)


def test_random_shapes_are_named_by_their_numbers() -> None:
    assert random_shape("random:layers=3,vocab=64000") == {**random_shape("random:"), "layers": 3, "vocab": 64000}
    for wrong in ("layer=3", "layers=0", "layers=two", "layers"):
        with pytest.raises(ValueError, match=f"'{wrong}' is not KEY=N .* one of layers, hidden"):
            random_shape(f"random:vocab=64000,{wrong}")


def cost_row(method: str, stage: int, seconds: list[float], **changed: Any) -> dict[str, Any]:
    """A row of suite cpu as far as its tables read it."""
    steps = len(seconds)
    return {
        **row(None, seconds),
        "kind": "cost",
        "method": method,
        "model": TINY,
        "stage": stage,
        "checkpointing": False,
        "prepare_state": False,
        "temperature": None,
        "grass": {"sample_period": 5},
        "device": "cpu",
        "hardware": "any",
        "threads": 1,
        "commit": "0123abc",
        "versions": {"torch": "2"},
        **{
            f"{part}_seconds": [share] * steps
            for part, share in (("forward", 0.5), ("backward", 0.25), ("step", 0.125))
        },
        "probe_seconds": [],
        "active": [None] * steps,
        "changed": [None] * steps,
        "baseline_bytes": 1e9,
        "train_peak_bytes": 2e9,
        "trainable": 2_000_000,
        "shape": {"layers": 4, "layer_numel": 1_000_000, "norm_numel": 0, "tied": False},
        "observed": {
            "active": None,
            "flops": 300,
            "traffic": {"all_gather": 6_000_000, "all_reduce": 4},
            "calls": {"all_gather": 3, "all_reduce": 1},
            "rest_bytes": 5e6,
            "peak_bytes": 12e6,
        },
        **changed,
    }


def cells_of(line: str) -> list[str]:
    return line.strip("| ").split(" | ")


def test_ratios_are_within_the_round_and_the_setting() -> None:
    rows = [
        cost_row("full", 2, [4.0, 4.0, 10.0]),
        cost_row("full", 2, [8.0, 8.0, 8.0], accumulation=4),
        cost_row("lora", 2, [3.0, 3.0, 3.0]),
        cost_row("grass", 2, [1.0, 1.0, 1.0], active=[[0], [0], [1]], probe_seconds=[9.0]),
        cost_row("grass", 2, [4.0, 4.0, 4.0], accumulation=4),
        cost_row("full", 2, [2.0, 2.0, 2.0], seed=1),
        cost_row("grass", 2, [1.0, 1.0, 1.0], seed=1),
        cost_row("grass", 2, [5.0, 5.0, 5.0], seed=2),  # in a round without its base
    ]
    table = [cells_of(line) for line in costs.time_table(rows)[2:]]
    assert [line[0].rpartition("; ")[2] for line in table[3:]] == ["accumulation 4"] * 2  # variants come last
    assert table[2][1:] == [
        "2",
        "1.00 (1.00 to 5.00)",
        "0.33 (0.17 to 0.50)",
        "0.33",
        "0.50, 0.25, 0.12",
        "400",
        "0.3",
        "",
        "9.00 (15.5%)",  # 20 of them in 1000 steps
    ]
    assert table[4][3] == "0.50"


def test_switches_are_compared_with_the_rest_of_their_period() -> None:
    active = [[0], [0], [1], [1], [1], [2]]
    one = cost_row("grass", 2, [9.0, 9.0, 3.0, 1.0, 2.0, 7.0], active=active)
    assert costs.after_switch(one) == [2.0]  # nothing follows the last
    assert costs.after_switch(cost_row("full", 2, [1.0, 2.0])) == []


@pytest.fixture
def known_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "flops", lambda row, active: 300)
    monkeypatch.setattr(floors, "traffic", lambda row, active: {"reduce_scatter": 3_000_004})
    monkeypatch.setattr(floors, "memory", lambda row, active: {"total": 10e6})
    monkeypatch.setattr(floors, "seconds", lambda row: [row["plain"]] * len(row["seconds"]))


def test_what_is_above_its_floor_is_explained(known_floors: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(costs.REASONS, ("grass", 2, "traffic"), "padding")
    rows = [
        cost_row("grass", 2, [1.0, 2.0], plain={"forward": 0.25, "backward": 0.375, "adam": 0.125, "traffic": 0.5}),
        cost_row("grass", 2, [1.0, 1.0], seed=1),  # without
    ]
    (line,) = costs.floor_table(rows)[2:]
    assert cells_of(line)[2:] == [
        "1.00 (1.00 to 1.00)",
        "2.00 (2.00 to 2.00)",
        "1.20 (1.20 to 1.20)",
        "1.20",
        "+0.25, -0.12, +0.00",
        "0.50",
        "traffic: padding; memory: not explained; time: not explained",
    ]
    memory = cells_of(costs.memory_table(rows)[2])
    assert memory[2:] == ["3.00 GB", "1.00 (1.00 to 1.00) GB", "", "5, 12 MB", "", "6.0 MB (4)", "2.0 M"]


def test_aims_are_judged_by_what_was_measured(known_floors: None) -> None:
    rows = [
        cost_row("full", 2, [4.0]),
        cost_row("lora", 2, [2.0]),
        cost_row("grass", 2, [1.2]),
        cost_row("grass", 2, [0.1], offload="none"),
    ]
    judged = {cells_of(line)[0]: cells_of(line)[1:] for line in aims_table(rows)[2:]}
    assert judged["time of stock full fine-tuning's, ZeRO-2"] == ["0.35", "0.30", "met"]
    assert judged["time of LoRA r=128's, ZeRO-2"] == ["0.52", "0.60", "**missed**"]
    assert judged["peak of live tensors of its floor, ZeRO-2"] == ["1.10", "1.20", "**missed**"]
    assert not any("ZeRO-3" in label for label in judged)  # not measured, not judged


def test_growth_is_measured_along_every_axis_and_fitted(tmp_path: Path) -> None:
    rows = [
        cost_row(
            cell["method"],
            2,
            [growth.numbers_of(cell)["layers"] ** 2 * growth.numbers_of(cell)["ranks"] / 10],
            model=cell["model"],
            grass=cell["grass"],
            ranks=cell["ranks"],
        )
        for cell in growth.growth_cells()
    ]
    for axis in growth.AXES:
        for method in axis.methods:
            assert [value for value, _ in growth.along(axis, method, rows)] == sorted(axis.values)
    table = {tuple(cells_of(line)[::2][:2]): cells_of(line) for line in growth.growth_table(rows)[2:]}
    assert table["layers", "grass"][1] == "6, 12, 24, 48"
    assert table["layers", "grass"][3:5] == ["7.2, 28.8, 115, 461", "2.00 (0.00)"]
    assert table["ranks", "full"][4] == "1.00 (0.00)"
    assert table["active layers", "grass"][4] == "0.00 (0.00)"
    fitted = growth.fit([(1.0, 1.0), (2.0, 8.0), (4.0, 4.0)])
    assert fitted is not None
    assert (fitted.exponent, fitted.residual) == (pytest.approx(1.0), pytest.approx(0.6535, rel=1e-3))
    assert growth.fit([(1.0, 0.0), (2.0, 1.0)]) is None
    growth.draw_growth(rows, tmp_path)
    images = {line.split("(")[1].rstrip(")") for line in growth.growth_images(rows)}
    assert images == {f"plots/{path.name}" for path in tmp_path.iterdir()}
    assert len(images) == len(growth.AXES)


def test_texts_follow_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_floors: None) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "".join(
            f"{name}\n<!-- benchmark {name}: python benchmarks/render.py -->\nold\n  <!-- end of benchmark {name} -->\n"
            for name in render.BLOCKS
        )
    )
    monkeypatch.setattr(render, "README", page)
    assert "##" not in render.results(tmp_path)
    assert "old" not in render.readme(tmp_path)
    badam = {"changed": [True, False], "versions": {"torch": "2", "badam": "1.4"}}
    rows = [
        cost_row("full", 2, [4.0, 4.0]),
        cost_row("lisa-toggle", 2, [4.0, 4.0, 4.0], moved_frozen=[28, 28, 27]),
        cost_row("full", 3, [4.0, 4.0]),
        cost_row("grass", 3, [1.0, 1.0], active=[[0], [0]], temperature=0.5),
        cost_row("badam-package", 3, [2.0, 2.0], **badam),
        cost_row("grass", 2, [1.0], **{name: growth_cell()[name] for name in ("model", "grass", "ranks")}),
    ]
    (tmp_path / "cpu.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    text = render.results(tmp_path)
    assert f"{TINY}, ZeRO-2 / ZeRO-3, 2 rank(s)" in text
    assert "temperature 0.5; torch 2, badam 1.4; commit 0123abc" in text
    assert "badam 1.4, blocks in random order: 1 of its 2 measured steps changed no weight" in text
    assert "toggling was to freeze, 28 (27 to 28) moved per step" in text
    assert "zenflow` is left out: " in text
    assert "## How cost grows" in text
    page.write_text(render.readme(tmp_path))
    assert page.read_text() == render.readme(tmp_path)
    assert "\n".join(short_table(rows)) in page.read_text()
    assert zero3_sentence(rows) + "  <!-- end of benchmark zero3 -->" in page.read_text()
    sentence = " ".join(zero3_sentence(rows).split())
    assert (
        "stock ZeRO-3 4.00 s per step and at most 0.01 GB of tensors on a rank's device, `grass` 1.00 s (0.25 of it) and 0.01 GB, "
        "BAdam's" in sentence
    )
    assert "0.50 s of a `grass` step are forward." in sentence
    timed = [{**one, "plain": {"forward": 0.25}} for one in rows]
    assert "are forward, 0.25 s more than in plain PyTorch" in " ".join(zero3_sentence(timed).split())
    once = [*rows, cost_row("grass", 3, [2.0, 2.0], seed=1)]
    assert "BAdam's" not in zero3_sentence(once)  # not in all rounds that grass was in


def growth_cell() -> dict[str, Any]:
    return next(cell for cell in growth.growth_cells() if cell["method"] == "grass")


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
        "dtype": "bf16",
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


def test_gpu_tables_name_what_did_not_fit_and_what_the_paper_says() -> None:
    common = {"model": "llama2-7b-random", "stage": 2, "ranks": 1}
    skipped = {**row(None, []), **common, "method": "full", "skipped": "out of memory on a device of 80 GB"}
    ours = row("none", [1.0, 2.0, 3.0], **common)
    other = row("none", [4.0, 4.0, 4.0], **{**common, "micro_batch": 4})
    table = places.gpu_table([skipped, ours, other, row(None, [1.0, 1.0, 1.0], **{**common, "method": "grass"})])
    lines = [cells_of(line) for line in table[2:]]
    assert lines[0][1:5] == ["2, 1", "2", "as by default", "skipped: out of memory on a device of 80 GB"]
    assert lines[0][9] == "51.32 GB"
    assert lines[1][5:10] == ["1.000 (1.000 to 1.000)", "1.000", "100", "3.00 GB", ""]  # 2 x 100 tokens in 2 s
    assert lines[2][2] == "4"
    assert lines[2][5] == "1.000 (1.000 to 1.000)"  # of its own batch
    assert lines[3][8:10] == ["3.00 GB", "19.08 GB"]
    assert len({line.count("|") for line in table}) == 1
