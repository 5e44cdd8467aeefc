# SPDX-License-Identifier: Apache-2.0
"""The suites: cases run for real on a tiny model, every case can be run, rows and precisions are what they say."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama
from transformers import AutoModelForCausalLM

from benchmarks import cost_model, methods, precision
from benchmarks.case import Case
from benchmarks.checkpoint import tables as checkpoint_tables
from benchmarks.gpu.tables import PAPER
from benchmarks.models import SHAPES, random_shape
from benchmarks.offload import tables as offload_tables
from benchmarks.offload.variants import OFFLOADS
from benchmarks.quality.suite import PARTS, SETTINGS, quality_case
from benchmarks.quality.tables import tables as quality_tables
from benchmarks.report import rows as rowfile
from benchmarks.run import installed, run_case
from benchmarks.suite import Request
from benchmarks.suites import SUITES
from benchmarks.tasks import TASKS, Exam
from benchmarks.worker import MEASUREMENTS
from grass_ds.config import GrassConfig, OffloadConfig
from grass_ds.precision import Rates
from launch.data.chat_template import Template
from launch.model import load_tokenizer

TINY = "llama-tiny-random"
FROM_GIT = {"commit": "0123abc", "jobs": 1}
ROWS = Path(rowfile.__file__).parents[1] / "rows"


def cases(suite: str, rounds: int = 1) -> list[Case]:
    tasks = ("arithmetic", "choice")
    rows = rowfile.read(ROWS / f"{suite}.jsonl")
    return list(SUITES[suite].cases(Request(rounds=rounds, parts=PARTS, tasks=tasks, rows=rows)))


def tiny(suite: str, steps: int, **wanted: Any) -> Case:
    """The first case of the suite with these fields, on the tiny model."""
    found = next(case for case in cases(suite) if replace(case, **wanted) == case)
    return replace(found, model=TINY, sequence=16, steps=steps)


# ---- cases that run ------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_case_on_disk_moves_state_and_leaves_nothing(tmp_path: Path) -> None:
    case = replace(tiny("offload", 6, offload="nvme-stream-files"), plain=True, dtype="fp32", disk=str(tmp_path))
    row = run_case(case, 300)
    assert len({tuple(active) for active in row["active"]}) == 2  # a draw within the measured steps
    assert row["first_steps"] == 0
    state = row["bytes"]["optimizer_state"]
    assert state["nvme"] > state["host"] > state["device"] > 0
    assert min(row["disk_bytes"].values()) > 0
    assert row["resident_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in json.dumps(row)
    assert "nvme-stream-files" in "".join(offload_tables.tables([{**row, **FROM_GIT}]))
    # The cost model in fp32: 4 bytes per weight.
    weights, seen = 6 * 41_088 + 64 + 2 * 64_000, row["observed"]
    assert (row["dtype"], row["skipped_steps"]) == ("fp32", 0)
    assert row["bytes"]["weights"]["device"] == pytest.approx(4 * weights, rel=0.01)
    least = cost_model.memory(row, seen["active"])
    assert least["weights"] == 4 * weights
    assert seen["peak_bytes"] >= least["total"]
    moved = cost_model.traffic(row, seen["active"])
    assert moved["reduce_scatter"] == moved["all_gather"] == 4 * (2 * 41_088 + 64)
    assert cost_model.wire_bytes(seen["traffic"]) == pytest.approx(cost_model.wire_bytes(moved), rel=0.02)
    assert seen["flops"] == cost_model.flops(row, seen["active"])
    assert all(min(parts.values()) > 0 for parts in cost_model.seconds(row))


@pytest.mark.all
@pytest.mark.dist
def test_a_checkpoint_case_weighs_what_it_saves(tmp_path: Path) -> None:
    case = replace(tiny("checkpoint", 2, stage=2, async_save=True), ranks=1, disk=str(tmp_path))
    row = run_case(case, 300)
    assert row["async"]
    # Weights, their fp32 values and all moments, but for those of the embeddings, which never train.
    trained, everything = 6 * 41_088 + 64, 6 * 41_088 + 64 + 2 * 64_000
    assert row["checkpoint_bytes"] == pytest.approx(2 * everything + 12 * trained + 4 * 2 * 64_000, rel=0.1)
    assert 0 < row["stall_seconds"] <= row["disk_seconds"]
    stock = {**row, "method": "full", "async": False, "prepare_state": False}
    assert [line.label for line in checkpoint_tables.lines([stock, row])] == ["full", "grass, late, async"]


@pytest.mark.all
@pytest.mark.dist
def test_badam_loses_the_last_step_on_every_block() -> None:
    pytest.importorskip("badam")
    row = run_case(replace(tiny("cpu", 10, method="badam-package"), grass={"sample_period": 5}), 300)
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


@pytest.mark.all  # most of a minute: cases of other suites run whole by default
@pytest.mark.dist
def test_a_quality_case_trains_and_measures(tmp_path: Path) -> None:
    """The whole of a case: a tiny model on the built-in task; rank, engine, probing, drawing, every measurement."""
    tokenizer = load_tokenizer()
    model = tiny_llama(layers=3)
    model.resize_token_embeddings(len(tokenizer))
    model.bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    case = replace(
        quality_case("builtin", "grass", lr=1e-2, curve=4, reprobe=4, ablate_layers=1, steps=8),
        grass={**SETTINGS, "sample_period": 2, "num_active_layers": 1},
        model=str(tmp_path),
        test_rows=4,
        dtype="fp32",
    )
    found = run_case(case, 300)
    assert found["active"][:4] == [None] * 4
    drawn = [layers for (layers,) in found["active"][4:]]
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert len(found["train_losses"]) == len(found["batches"]) == 8
    assert found["tokens"] <= sum(rows * length for rows, length in found["batches"])
    probed, trained = found["curve"]
    assert (probed["step"], trained["step"]) == (4, 8)
    # Nothing has moved before the first point; only the sum over the vocabulary can round otherwise.
    before = found["worth"]["before"]
    rounding = len(tokenizer) * torch.finfo(torch.float32).eps / 2 * before
    assert abs(probed["dev_loss"] - before) <= rounding < before - trained["dev_loss"]
    assert trained["dev_loss"] == found["dev_loss"] < probed["dev_loss"]
    assert found["test_loss"] > 0
    assert found["accuracy"].keys() == {"builtin:arithmetic"}
    assert [one["step"] for one in found["reprobes"]] == [4, 8]
    assert len(found["worth"]["losses"]) == 3
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
        assert case.offload is None or case.offload in OFFLOADS
        if methods.METHODS[case.method].grass is not None:
            GrassConfig(**case.grass)


@pytest.mark.parametrize("suite", ["cpu", "offload", "checkpoint"])
def test_rows_that_are_there_are_cases_of_their_suite(suite: str) -> None:
    rows = rowfile.read(ROWS / f"{suite}.jsonl")
    assert {Case.parse(row["cell"]).text() for row in rows} <= {case.text() for case in cases(suite, rounds=3)}


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


def test_a_case_with_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match="stages: no field of a case; known are kind"):
        Case.parse('{"kind": "cost", "method": "full", "stages": 2}')


def test_rounds_of_the_cpu_suite_are_interleaved_and_hold_what_was_asked() -> None:
    found = [case for case in cases("cpu", rounds=3) if not case.model.startswith("random:")]
    last = [case for case in found if case.seed == 2]
    assert found[-len(last) :] == last
    assert [replace(case, seed=0) for case in last] == found[: len(last)]
    core = {(case.method, case.stage) for case in last}
    assert core >= {("full", 2), ("full", 3), ("lora", 2), ("lisa-toggle", 2), ("badam-package", 3), ("grass", 3)}
    everything = {(case.method, case.stage) for case in found if case.offload is None}
    assert everything >= {(method, stage) for method in ("grass", "uniform", "cyclic") for stage in (1, 2, 3)}
    assert {case.accumulation for case in found} == {1, 4}
    assert sum(case.checkpointing for case in found) == 3
    assert {case.offload for case in found} == {None, "none", "nvme-stream"}


def test_gpu_cases_use_all_gpus_for_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import suite

    one = cases("gpu")
    assert {case.ranks for case in one} == {1}
    assert {case.model for case in one} == set(PAPER) <= set(SHAPES)
    monkeypatch.setattr(suite.get_accelerator(), "device_count", lambda: 4)
    assert {(case.stage, case.ranks) for case in cases("gpu")} == {(2, 1), (3, 4)}


def test_offload_variants_are_valid_and_share_their_seeds() -> None:
    found = cases("offload", rounds=2)
    assert [(case.seed, case.offload) for case in found] == [(seed, name) for seed in (0, 1) for name in OFFLOADS]
    for name, block in OFFLOADS.items():
        assert OffloadConfig(**block, nvme_path="/disk").device == name.split("-")[0]


def test_without_badam_its_cases_are_skipped_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = cases("cpu", rounds=2)
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    left = installed(found)
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
        model = AutoModelForCausalLM.from_config(SHAPES[name], dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(numel, rel=1e-3)


def test_random_shapes_are_named_by_their_numbers() -> None:
    assert random_shape("random:layers=3,vocab=64000") == {**random_shape("random:"), "layers": 3, "vocab": 64000}
    for wrong in ("layer=3", "layers=0", "layers=two", "layers"):
        with pytest.raises(ValueError, match=f"'{wrong}' is not KEY=N .* one of layers, hidden"):
            random_shape(f"random:vocab=64000,{wrong}")


# ---- precision of a file of rows -----------------------------------------------------------------------------------

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
    ("asked", "there", "gflops", "message"),
    [
        (
            "auto",
            "bf16",
            EMULATES,
            "holds rows of bf16: bf16 is emulated .* 13 times as long as in fp32 .* --rows FOLDER.* --dtype bf16$",
        ),
        ("fp32", "bf16", EMULATES, "holds rows of bf16, and --dtype asks for fp32.* --rows FOLDER$"),
        ("auto", "fp16", REFUSES, "holds rows of fp16: fp16 does not work .* of bf16 .*--rows FOLDER$"),
        ("fp16", None, REFUSES, "--dtype fp16: fp16 does not work on this device"),
    ],
)
def test_a_precision_that_nobody_would_want_ends_the_suite(
    asked: str, there: str | None, gflops: dict[str, float], message: str
) -> None:
    rows = [] if there is None else [{"dtype": there}]
    with pytest.raises(ValueError, match=message):
        precision.choose(asked, FILE, rows, Rates(gflops), ["bf16", "fp32"])


def test_old_rows_are_of_bf16_and_a_file_holds_one_precision(tmp_path: Path) -> None:
    file = tmp_path / "quality.jsonl"
    assert rowfile.read(file) == []
    file.write_text('{"kind": "quality"}\n{"kind": "cost"}\n')
    assert [(one["dtype"], one["jobs"]) for one in rowfile.read(file)] == [("bf16", 2), ("bf16", 1)]
    file.write_text('{"kind": "quality"}\n{"kind": "quality", "dtype": "fp32"}\n')
    with pytest.raises(ValueError, match=r"quality\.jsonl: rows of bf16 and fp32"):
        rowfile.read(file)
