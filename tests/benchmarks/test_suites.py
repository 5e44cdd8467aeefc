# SPDX-License-Identifier: Apache-2.0
"""The suites: cases run for real on a tiny model, every case can be run, rows and precisions are what they say."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama

from benchmarks import cost_model, methods, precision, run
from benchmarks.case import Case, Request, read_rows
from benchmarks.checkpoint import tables as checkpoint_tables
from benchmarks.gpu.tables import PAPER
from benchmarks.models import SHAPES, random_model
from benchmarks.offload import tables as offload_tables
from benchmarks.offload.suite import OFFLOADS
from benchmarks.quality.suite import PARTS, SETTINGS, quality_case
from benchmarks.quality.tables import tables as quality_tables
from benchmarks.suites import KEEPS_MEMORY, SUITES
from benchmarks.tasks import TASKS, Exam
from benchmarks.worker import MEASUREMENTS
from grass_ds.precision import Rates
from launch.data.chat_template import Template
from launch.model import load_tokenizer

TINY = "llama-tiny-random"
LAYER, EMBEDDINGS = 41_088, 64_000  # weights of a layer, and of the embeddings or the head
FROM_GIT = {"commit": "0123abc", "jobs": 1}
ROWS = Path(run.__file__).parent / "rows"


def cases(suite: str, rounds: int = 1) -> list[Case]:
    tasks = ("arithmetic", "choice")
    rows = read_rows(ROWS / f"{suite}.jsonl")
    return list(SUITES[suite].cases(Request(rounds=rounds, parts=PARTS, tasks=tasks, rows=rows)))


def tiny(suite: str, steps: int, **wanted: Any) -> Case:
    """The first case of the suite with these fields, on the tiny model."""
    found = next(case for case in cases(suite) if replace(case, **wanted) == case)
    return replace(found, model=TINY, sequence=16, steps=steps)


# ---- cases that run ------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_case_on_disk_moves_state_and_leaves_nothing(tmp_path: Path) -> None:
    case = replace(tiny("offload", 6, offload="nvme-stream-files"), plain=True, dtype="fp32", disk=str(tmp_path))
    row = run.run_case(case, 300)
    assert len({tuple(active) for active in row["active"]}) == 2  # a draw within the measured steps
    state = row["bytes"]["optimizer_state"]
    assert state["nvme"] > state["host"] > state["device"] > 0
    assert state["nvme"] >= 12 * 6 * LAYER // 2  # of all layers, not only of those drawn
    assert min(row["disk_bytes"].values()) > 0
    assert list(tmp_path.iterdir()) == [] and str(tmp_path) not in json.dumps(row)
    assert "nvme-stream-files" in "".join(offload_tables.tables([{**row, **FROM_GIT}]))
    # The cost model in fp32: 4 bytes per weight.
    seen, weights = row["observed"], 4 * (6 * LAYER + 64 + 2 * EMBEDDINGS)
    assert (row["dtype"], row["skipped_steps"]) == ("fp32", 0)
    assert row["bytes"]["weights"]["device"] == pytest.approx(weights, rel=0.01)
    least, moved = cost_model.memory(row, seen["active"]), cost_model.traffic(row, seen["active"])
    assert least["weights"] == weights and seen["peak_bytes"] >= least["total"]
    assert moved["reduce_scatter"] == moved["all_gather"] == 4 * (2 * LAYER + 64)
    assert cost_model.wire_bytes(seen["traffic"]) == pytest.approx(cost_model.wire_bytes(moved), rel=0.02)
    assert seen["flops"] == cost_model.flops(row, seen["active"])
    assert all(min(parts.values()) > 0 for parts in cost_model.seconds(row))


@pytest.mark.all
@pytest.mark.dist
def test_a_checkpoint_case_weighs_what_it_saves(tmp_path: Path) -> None:
    case = replace(tiny("checkpoint", 2, stage=2, async_save=True), ranks=1, disk=str(tmp_path))
    row = run.run_case(case, 300)
    # Weights, their fp32 values and all moments, but for those of the embeddings, which never train.
    trained, frozen = 6 * LAYER + 64, 2 * EMBEDDINGS
    assert row["checkpoint_bytes"] == pytest.approx((2 + 12) * trained + (2 + 4) * frozen, rel=0.1)
    assert row["async"] and 0 < row["stall_seconds"] <= row["disk_seconds"]
    stock = {**row, "method": "full", "async": False, "prepare_state": False}
    assert [label for label, _ in checkpoint_tables.lines([stock, row])] == ["full", "grass, late, async"]


@pytest.mark.all
@pytest.mark.dist
def test_badam_trains_one_layer_at_a_time() -> None:
    pytest.importorskip("badam")
    row = run.run_case(replace(tiny("cpu", 10, method="badam-package"), grass={"sample_period": 5}), 300)
    assert row["bytes"]["weights"]["device"] > 0
    assert 6 * LAYER <= row["bytes"]["optimizer_state"]["device"] < 9 * LAYER
    assert (row["stage"], row["trainable"]) == (3, LAYER)  # a sharded layer, counted whole
    blocks = row["active"]
    assert [len(block) for block in blocks] == [1] * 10
    assert sum(blocks[step] != blocks[step + 1] for step in range(9)) == 2


@pytest.mark.all  # most of a minute: cases of other suites run whole by default
@pytest.mark.dist
def test_a_quality_case_trains_and_measures(tmp_path: Path) -> None:
    """The whole of a case: a tiny model on the built-in task; rank, engine, probing, drawing, every measurement."""
    tokenizer, model = load_tokenizer(), tiny_llama(layers=3)
    model.resize_token_embeddings(len(tokenizer))
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = {**SETTINGS, "sample_period": 2, "num_active_layers": 1}
    case = quality_case("builtin", "grass", lr=1e-2, curve=4, steps=8, grass=settings)
    found = run.run_case(replace(case, model=str(tmp_path), test_rows=4, dtype="fp32"), 300)
    assert found["active"][:4] == [None] * 4
    drawn = [layers for (layers,) in found["active"][4:]]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert len(found["train_losses"]) == len(found["batches"]) == 8
    assert found["tokens"] <= sum(rows * length for rows, length in found["batches"])
    (probed,) = found["curve"]  # that of the last step is the row's
    assert probed["step"] == 4
    assert found["dev_loss"] < probed["dev_loss"]
    assert found["test_loss"] > 0
    assert found["accuracy"].keys() == {"builtin:arithmetic"}
    exam = Exam(TASKS["builtin"], Template.choose(tokenizer), None, rows=4)
    assert found["data"] == exam.fingerprint()
    assert found["train_rows"] == {"builtin:arithmetic": len(exam.train)}
    assert found["bytes"]["optimizer_state"]["host"] > 0
    assert "task `builtin`" in quality_tables([{**found, **FROM_GIT}])[0]


# ---- suites --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_every_case_can_be_run_and_is_the_key_of_its_row(suite: str) -> None:
    found = cases(suite, rounds=2)
    assert len({case.text() for case in found}) == len(found)
    for case in found:
        assert Case.parse(case.text()) == case
        local = replace(case, dtype="fp16", disk="/disk", data="/data")
        assert local.text() == case.text() and Case.parse(local.text(local=True)) == local
        assert case.kind in MEASUREMENTS and case.method in methods.METHODS
        assert case.task is None or case.task in TASKS
        methods.grass_config(local)  # refuses what is no setting, in the "offload" block too


@pytest.mark.parametrize("suite", ["cpu", "quality", "frontier", "samplers", "levers", "offload", "checkpoint"])
def test_rows_that_are_there_are_cases_of_their_suite(suite: str) -> None:
    rows = read_rows(ROWS / f"{suite}.jsonl")
    assert {Case.parse(row["cell"]).text() for row in rows} <= {case.text() for case in cases(suite, rounds=3)}


@pytest.mark.parametrize("user", [None, "glibc.malloc.arena_max=1"])
def test_ranks_of_the_suites_that_say_so_keep_freed_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: str | None
) -> None:
    name, value = next(iter(KEEPS_MEMORY.items()))
    monkeypatch.setattr(os, "environ", {key: of for key, of in os.environ.items() if key != name})
    if user is not None:
        os.environ[name] = user
    monkeypatch.setattr(run, "choose_precision", lambda *args: "bf16")
    for suite, expected in (("cpu", user), ("compute", user or value)):
        folders = ["--rows", str(tmp_path), "--nvme-path", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["run.py", "--suite", suite, "--limit", "0", *folders])
        run.main()
        assert os.environ.get(name) == expected


def test_measuring_needs_no_reporting() -> None:
    """From the worker on, no module that it imports is one of tables."""
    folder, found, left = ROWS.parent, set(), {"worker"}
    while left:
        name = left.pop()
        found.add(name)
        imports = re.findall(r"^from benchmarks\.([\w.]+) import", (folder / f"{name}.py").read_text(), re.MULTILINE)
        left |= {one.replace(".", "/") for one in imports} - found
    assert {"measure/engine", "measure/observer", "quality/training", "cost_model"} <= found
    assert not [name for name in found if name.startswith("report/") or "table" in name]


def test_rounds_of_the_cpu_suite_are_interleaved_and_hold_what_was_asked() -> None:
    found = cases("cpu", rounds=3)
    last = [case for case in found if case.seed == 2]
    assert found[-len(last) :] == last
    assert [replace(case, seed=0) for case in last] == found[: len(last)]
    core = {(case.method, case.stage) for case in last}
    assert core >= {("full", 2), ("full", 3), ("lora", 2), ("lisa-toggle", 2), ("badam-package", 3), ("grass", 3)}
    everything = {(case.method, case.stage) for case in found if case.offload is None}
    assert everything >= {(method, stage) for method in ("grass", "uniform", "cyclic") for stage in (1, 2, 3)}
    assert {case.accumulation for case in found} == {1, 4} and any(case.checkpointing for case in found)
    assert {case.offload for case in found} == {None, "none", "nvme-stream"}


def test_gpu_cases_use_all_gpus_for_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import suite

    one = cases("gpu")
    assert {case.ranks for case in one} == {1}
    assert {case.model for case in one} == set(PAPER) <= set(SHAPES)
    monkeypatch.setattr(suite.get_accelerator(), "device_count", lambda: 4)
    assert {(case.stage, case.ranks) for case in cases("gpu")} == {(2, 1), (3, 4)}


def test_offload_variants_share_their_seeds() -> None:
    found = [(case.seed, case.offload) for case in cases("offload", rounds=2)]
    assert found == [(seed, name) for seed in (0, 1) for name in OFFLOADS]


def test_without_badam_its_cases_are_skipped_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cases("cpu", rounds=2)
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    left = run.installed(found)
    assert [case for case in found if case not in left] == [case for case in found if case.method == "badam-package"]
    assert len(found) - len(left) == 2
    printed = capsys.readouterr().out.splitlines()
    assert printed == ["skipped: badam-package needs the package badam, not installed here (pip install badam)"]


# ---- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "numel"), [("llama2-7b-random", 6.738e9), ("tinyllama-random", 1.100e9), ("gemma-2b-random", 2.506e9)]
)
def test_shapes_have_the_published_size(name: str, numel: float) -> None:
    with torch.device("meta"):
        model = random_model(name, torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(numel, rel=1e-3)


# ---- precision of a file of rows -----------------------------------------------------------------------------------

# GFLOP/s of a CPU without bf16, a GPU with it, and one without.
EMULATES, COMPUTES = {"bf16": 1.5, "fp32": 20.0}, {"bf16": 300e3, "fp16": 290e3, "fp32": 20e3}
GPU_OF_FP16 = {"bf16": 9e3, "fp16": 90e3, "fp32": 14e3}
FILE = Path("rows/cpu.jsonl")


@pytest.mark.parametrize(
    ("asked", "there", "gflops", "chosen", "reason"),
    [
        ("auto", None, COMPUTES, "bf16", "by what the hardware computes"),
        ("auto", None, GPU_OF_FP16, "fp16", "by what the hardware computes"),
        ("auto", None, EMULATES, "fp32", "by what the hardware computes"),
        ("auto", "fp32", COMPUTES, "fp32", "as the rows in rows/cpu.jsonl"),
        (
            "auto",
            "bf16",
            EMULATES,
            "bf16",
            "as the rows in rows/cpu.jsonl; bf16 is emulated .* 13 times as long as in fp32 .*",
        ),
        ("fp16", None, COMPUTES, "fp16", "asked for by --dtype fp16"),
        ("bf16", None, EMULATES, "bf16", "asked for by --dtype bf16; bf16 is emulated .*"),
        ("fp32", "fp32", EMULATES, "fp32", "as the rows in rows/cpu.jsonl"),
    ],
)
def test_the_precision_of_a_file_of_rows(
    asked: str, there: str | None, gflops: dict[str, float], chosen: str, reason: str
) -> None:
    rows = [] if there is None else [{"dtype": there}]
    name, why = precision.choose(asked, FILE, rows, Rates(gflops), tuple(gflops))
    assert name == chosen and re.fullmatch(reason, why)


def test_another_precision_than_that_of_the_rows_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rows/cpu\.jsonl holds rows of bf16, and --dtype asks for fp32.* --rows FOLDER$"
    ):
        precision.choose("fp32", FILE, [{"dtype": "bf16"}], Rates(EMULATES), ["bf16", "fp32"])


def test_old_rows_are_of_bf16_and_a_file_holds_one_precision(tmp_path: Path) -> None:
    file = tmp_path / "quality.jsonl"
    assert read_rows(file) == []
    file.write_text('{"kind": "quality"}\n{"kind": "cost"}\n')
    assert [(one["dtype"], one["jobs"]) for one in read_rows(file)] == [("bf16", 2), ("bf16", 1)]
    file.write_text('{"kind": "quality"}\n{"kind": "quality", "dtype": "fp32"}\n')
    with pytest.raises(ValueError, match=r"quality\.jsonl: rows of bf16 and fp32"):
        read_rows(file)
