# SPDX-License-Identifier: Apache-2.0
"""launch/train.py as a user starts it: through the DeepSpeed launcher and torchrun, on two ranks, with a tiny model."""

import json
import os
import runpy
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.programs import ROOT, run_forked, torchrun, train
from helpers.ranks import free_port
from helpers.tiered import tiered
from transformers import AutoModelForCausalLM

from launch import distributed

PROBE, STEPS = 3, 9

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def deepspeed_launcher() -> list[str]:
    options = ["--log_level", "critical", "--num_accelerators", "2", "--master_addr", "127.0.0.1"]
    return [str(Path(sys.executable).parent / "deepspeed"), *options, "--master_port", str(free_port())]


def assert_nothing_is_trained_twice(options: list[str], folder: Path) -> None:
    """Interrupted while it measured, the job starts again from the checkpoint of its last step."""
    weights, history = folder / "out" / "model.safetensors", folder / "out" / "grass_history.jsonl"
    before = weights.read_bytes(), history.read_text(), json.loads((folder / "out" / "report.json").read_text())
    weights.unlink()
    again = train(torchrun(2), options, folder)
    assert again.returncode == 0, again.stderr[-4000:]
    assert (weights.read_bytes(), history.read_text()) == before[:2]
    after = json.loads((folder / "out" / "report.json").read_text())
    assert all(after[key] == before[2][key] for key in ("before", "after", "layers"))


def assert_nothing_is_said_but_by_the_run(done: subprocess.CompletedProcess[str]) -> None:
    """Precision first, and once; no warnings that a user cannot act on, no lines of the launcher."""
    # transformers prints this on every rank; text and newline of two ranks can interleave.
    stdout = done.stdout.replace("[INFO] Running in WANDB offline mode", "")
    lines = [line for line in stdout.splitlines() if line]
    # Where it continues from may come first.
    assert any(line.startswith("precision: ") for line in lines[:2]), lines[:5]
    assert sum(line.startswith("precision: ") for line in lines) == 1
    said = done.stdout + done.stderr
    for noise in ("FutureWarning", "[INFO] [", "built successfully", "hostfile"):
        assert noise not in said, said[:3000]


@pytest.mark.parametrize("file", tiered(["grass.json", "zero3_grass.json"], "zero3_grass.json"))
def test_the_main_job(model_folder: Path, tmp_path: Path, file: str) -> None:
    """Start to report: the model is saved and loads, only drawn layers moved, plots and one wandb run are there.

    With three test rows on two ranks: in ZeRO-3 the one without a second row must keep the other company.
    """
    config: dict[str, Any] = json.loads((ROOT / "ds_configs" / file).read_text())
    config["grass"] |= {"num_active_layers": 1, "probe_steps": PROBE, "sample_period": 3}
    (tmp_path / "grass.json").write_text(json.dumps(config))
    options = ["--deepspeed", str(tmp_path / "grass.json"), "--model", str(model_folder), "--max_steps", str(STEPS)]
    options += ["--eval_samples", "3", "--per_device_eval_batch_size", "1", "--max_new_tokens", "8"]
    options += ["--report_to", "wandb", "--logging_steps", "1", "--resume_from_checkpoint", "true"]
    done = train(deepspeed_launcher(), options, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert_nothing_is_trained_twice(options, tmp_path)

    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["ranks"] == 2
    assert sum(report["layers"]) == STEPS - PROBE
    assert {"exact", "loss"} <= report["before"].keys() & report["after"].keys()
    assert report["memory"]["weights"]["device"] > 0
    assert all(Path(plot).stat().st_size > 10_000 for plot in report["files"]["plots"])
    assert len(report["files"]["plots"]) == 2
    assert len({run.name.rsplit("-", 1)[1] for run in (tmp_path / "wandb").glob("offline-run-*")}) == 1
    assert "exact match" in done.stdout
    assert_nothing_is_said_but_by_the_run(done)
    total = report["seconds"].pop("total")
    assert sum(report["seconds"].values()) == pytest.approx(total)

    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    drawn = tuple(f"model.layers.{i}." for i, visits in enumerate(report["layers"]) if visits)
    assert moved
    assert all(name == "model.norm.weight" or name.startswith(drawn) for name in moved)


BAD: dict[str, tuple[list[str], str]] = {
    "missing-model": (["--model", "no/such/folder"], "no/such/folder"),
    "row-without-field": (["--data", "{folder}/rows.jsonl"], "row 1"),
    "other-encoding": (["--data", "{folder}/latin.csv"], "latin.csv: not text in utf-8 (line 2, byte 0xe9"),
    "torn-checkpoint": (["--resume_from_checkpoint", "{folder}/checkpoint-3"], "trainer_state.json is missing"),
    "no-wandb-login": (["--report_to", "wandb"], "wandb login"),
    "no-such-config": (["--deepspeed", "no/such.json"], "no/such.json: no such file"),
    "no-block": (["--deepspeed", "{folder}/plain.json", "--bf16", "true"], 'has no "bf16" block'),
}


def mistake(case: str, model_folder: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment of a start that must fail; what they name is made in ``folder``."""
    rows = [{"instruction": "1 + 1?", "output": "The answer is 2."}, {"instruction": "2 + 2?"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "latin.csv").write_bytes("instruction,output\ncafé,a\n".encode("latin-1"))
    (folder / "checkpoint-3").mkdir()
    (folder / "plain.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    options = [option.format(folder=folder) for option in BAD[case][0]]
    if "--deepspeed" not in options:
        options += ["--deepspeed", "ds_configs/grass.json"]
    if "--model" not in options:
        options += ["--model", str(model_folder)]
    return options, {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(folder / "none"), "HOME": str(folder)}


def run_program(environment: dict[str, str], options: list[str], folder: Path) -> None:
    os.environ.update(environment)
    sys.argv = ["launch/train.py", "--output_dir", str(folder / "out"), *options]
    runpy.run_path(sys.argv[0], run_name="__main__")


def test_mistakes_end_every_rank_with_one_message(model_folder: Path, tmp_path: Path) -> None:
    started = {}
    for folder in (tmp_path / case for case in BAD):
        folder.mkdir()
        options, environment = mistake(folder.name, model_folder, folder)
        started[folder] = (2, partial(run_program, environment, options, folder))
    for folder, codes in run_forked(started).items():
        case, log = folder.name, (folder / "log").read_text()
        assert all(code and code > 0 for code in codes), (case, codes, log)
        (message,) = [line for line in log.splitlines() if line.startswith("error")]
        assert BAD[case][1] in log[log.index(message) :], (case, log[-3000:])
        assert 'launch/train.py", line' not in log, (case, log[:3000])  # a message, no traceback of ours
        assert not (folder / "out" / "report.json").exists(), case


def speak() -> list[bool]:
    return [distributed.first_to_fail(), distributed.first_to_fail()]


def test_one_rank_tells_what_went_wrong(two_ranks: Any) -> None:
    """Also when it asks again; in a single process there is nobody else."""
    assert sorted(two_ranks.run(speak)) == [[False, False], [True, True]]
    assert distributed.first_to_fail()


def test_an_interrupted_run_ends_with_one_message(model_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the launcher and all ranks at once."""
    port = ["--master-port", str(free_port())]
    command = [sys.executable, "launch/torchrun.py", "--nproc-per-node", "2", *port, "launch/train.py"]
    command += ["--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    command += ["--deepspeed", "ds_configs/lisa.json", "--model", str(model_folder), "--eval_task", "none"]
    command += ["--max_steps", "100000", "--logging_steps", "1"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **output) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if line.startswith("step 2 "):
                os.killpg(run.pid, signal.SIGINT)
                break
        rest = run.communicate(timeout=60)[0]
    assert run.returncode == 128 + signal.SIGINT, said
    ending = [line for line in rest.splitlines() if line.strip() and not line.startswith("step ")]
    assert ending == ["interrupted"]


FAILING = """
import deepspeed.comm as dist
from launch import train
for error in (ValueError, RuntimeError):
    def parse(started):
        train.distributed.start()
        assert dist.is_initialized()
        raise error("no such thing")
    train.command_line.parse = parse
    try:
        status = train.main()
    except RuntimeError:
        status = "raised"
    print(status, dist.is_initialized())
"""


def test_the_process_group_is_left_however_the_program_ends() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", FAILING]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=120, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.endswith(("True", "False"))]
    assert said == ["1 False", "raised False"], done.stderr[-2000:]
