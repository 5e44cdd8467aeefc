# SPDX-License-Identifier: Apache-2.0
"""The .sbatch files on a real SLURM cluster of two machines: they train as elsewhere, and lose nothing when they are interrupted."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.programs import torchrun, train
from helpers.slurm import ROOT, Cluster, Job, why_not
from helpers.wandb_runs import records
from safetensors.torch import load_file

REASON = why_not()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(REASON is not None, reason=REASON or "")]

STEPS = 120
MULTI_NODE = ROOT / "slurm" / "multi_node.sbatch"
ONE_RANK_EACH = ["--gpus-per-node=1", "--ntasks-per-node=1", "--cpus-per-task=1"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def settings(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment that the .sbatch files take: a tiny model and a sampler that switches often."""
    config: dict[str, Any] = json.loads((ROOT / "ds_configs" / "grass.json").read_text())
    config["grass"] |= {"num_active_layers": 1, "probe_steps": 2, "sample_period": 3}
    file = tmp_path_factory.mktemp("config") / "grass.json"
    file.write_text(json.dumps(config))
    return {"CONFIG": str(file), "MODEL": str(model_folder)}


def arguments(steps: int, *more: str) -> str:
    fixed = "--eval_task none --logging_steps 1 --per_device_train_batch_size 2 --train_samples 64 --max_length 128"
    return " ".join([f"--max_steps {steps}", fixed, *more])


def train_here(ranks: int, folder: Path, settings: dict[str, str], steps: int) -> Path:
    """The same training without SLURM: the ranks as processes of one machine."""
    options = ["--deepspeed", settings["CONFIG"], "--model", settings["MODEL"], *arguments(steps).split()]
    done = train(torchrun(ranks), options, folder, PYTHONWARNINGS="ignore")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "out"


@pytest.fixture(scope="module")
def uninterrupted(settings: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_here(2, tmp_path_factory.mktemp("uninterrupted"), settings, STEPS)


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same weights, and the same layers at every step."""
    weights, others = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    history, others = ((folder / "grass_history.jsonl").read_text().splitlines()[1:] for folder in (one, other))
    assert history == others


def steps_done(folder: Path) -> int:
    history = folder / "grass_history.jsonl"
    return len(history.read_text().splitlines()) - 1 if history.is_file() else 0


def test_two_machines_train_like_one(cluster: Cluster, settings: dict[str, str], tmp_path: Path) -> None:
    """Two machines with two ranks each, and four ranks on one."""
    job = cluster.submit(
        MULTI_NODE, "four", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1",
        LAUNCHER="torchrun", OUTPUT=str(tmp_path / "two"), ARGS=arguments(8), **settings,
    )  # fmt: skip
    job.wait()
    assert re.search(r"4 x cpu", job.log)
    assert_same_run(tmp_path / "two", train_here(4, tmp_path / "one", settings, 8))


def test_an_interrupted_job_goes_on_as_if_nothing_had_been(
    cluster: Cluster, settings: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    """In turn the signal before the time limit, a job of a higher partition, `scontrol requeue`, and `scancel` with a new job by hand."""
    folder = tmp_path / "out"
    options = [*ONE_RANK_EACH, "--signal=B:USR1@60"]
    environment = settings | {
        "OUTPUT": str(folder),
        "LAUNCHER": "srun",
        "WANDB_DIR": str(tmp_path),
        "ARGS": arguments(STEPS, "--report_to wandb"),
    }

    def start(name: str) -> Job:
        return cluster.submit(MULTI_NODE, name, *options, **environment)

    def interrupt(job: Job, how: Callable[[], Any], start: int) -> None:
        """Stop the job for the time of number `start`, at least three steps after the last stop."""
        done = steps_done(folder)
        job.wait_until(lambda: job.starts == start and steps_done(folder) >= done + 3, "step")
        how()
        job.wait_until(lambda: job.log.count("stopped by SIG") == start, "stop")
        step = int(re.findall(r"with checkpoint-(\d+)", job.log)[-1])
        assert done + 3 <= step < STEPS
        assert (folder / f"checkpoint-{step}" / "grass_trainer.json").is_file()

    job = start("interrupted")
    urgent = "sbatch --parsable --partition=urgent --nodes=2 --exclusive --time=1 --output=/dev/null --wrap=true"
    interrupt(job, lambda: job.signal_script("USR1"), start=1)
    interrupt(job, lambda: cluster.run(*urgent.split()), start=2)
    interrupt(job, lambda: cluster.run("scontrol", "requeue", str(job.number)), start=3)
    interrupt(job, lambda: cluster.run("scancel", str(job.number)), start=4)
    job.wait(state="CANCELLED")
    assert re.findall(r"back to the queue \(exit code (\d+)", job.log)[:2] == ["75", "75"]
    assert re.findall(r"stopped by (SIG\w+)", job.log) == ["SIGUSR1", "SIGUSR1", "SIGTERM", "SIGTERM"]

    last = start("by-hand")
    last.wait()
    assert "continuing from" in last.log
    assert_same_run(folder, uninterrupted)

    parts = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(parts) == 5
    assert len({part.name.rsplit("-", 1)[1] for part in parts}) == 1
    # SIGTERM ends wandb's own process too, and what it had not written is filled in by the next start.
    rows = [row for part in parts for file in part.glob("run-*.wandb") for _, row in records(file)]
    steps = [row["train/global_step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))


def test_a_lost_machine_is_named_and_the_job_goes_on(
    cluster: Cluster, settings: dict[str, str], uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    options = arguments(STEPS, "--save_strategy steps --save_steps 10 --save_total_limit 2 --rank_timeout 3")
    job = cluster.submit(
        MULTI_NODE, "lost", *ONE_RANK_EACH, OUTPUT=str(folder), LAUNCHER="srun", ARGS=options, **settings
    )
    job.wait_until(lambda: (folder / "checkpoint-10" / "grass_trainer.json").is_file(), "checkpoint")
    cluster.kill("n2")
    job.wait_until(lambda: "lost: rank 1 on host n2" in job.log, "name of the lost rank", seconds=15)
    job.wait_until(lambda: job.state == "PENDING", "requeue", seconds=90)
    cluster.boot("n2")
    job.wait(150)
    assert job.starts > 1
    assert re.search(r"continuing from .*checkpoint-\d+", job.log)
    assert_same_run(folder, uninterrupted)


def test_an_array_runs_every_sampler(cluster: Cluster, settings: dict[str, str], tmp_path: Path) -> None:
    """And one of its jobs goes back to the queue alone, the one to which SLURM has given the number of the array."""
    lisa = tmp_path / "lisa.json"
    config = json.loads(Path(settings["CONFIG"]).read_text())
    config["grass"] = {"sampler": "uniform", "num_active_layers": 1, "sample_period": 2}
    lisa.write_text(json.dumps(config))
    environment = settings | {"CONFIGS": f"{settings['CONFIG']} {lisa}", "SEEDS": "5", "WANDB_DIR": str(tmp_path)}
    job = cluster.submit(
        ROOT / "slurm" / "array_sweep.sbatch", "sweep", "--array=0-1", *ONE_RANK_EACH,
        ARGS=arguments(30, "--report_to wandb"), OUTPUT_ROOT=str(tmp_path / "runs"), **environment,
    )  # fmt: skip
    folders = [tmp_path / "runs" / f"sweep-{job.number}-{task}" for task in range(2)]
    job.wait_until(lambda: steps_done(folders[1]) >= 3, "step")
    cluster.run("scancel", "-b", "-s", "USR1", f"{job.number}_1")
    job.wait()
    logs = [(cluster.folder / f"sweep-{job.number}-{task}.log").read_text() for task in range(2)]
    assert [log.count("back to the queue") for log in logs] == [0, 1]
    assert [log.count("starting from the beginning") for log in logs] == [1, 1]
    for folder, method in zip(folders, ("grass", "uniform"), strict=True):
        report = json.loads((folder / "report.json").read_text())
        assert report["method"].startswith(method)
        assert report["seed"] == 5
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 3
    assert all(f"sweep-{job.number}".encode() in file.read_bytes() for file in files)  # the group


LAUNCHERS = {
    "srun": "srun --ntasks-per-node=1 python",
    "torchrun": "srun --ntasks-per-node=1 torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=n1:29511 --rdzv-id=a",
    "mpirun": "mpirun --allow-run-as-root -n 2 --map-by node python",
    "deepspeed": "env -u CUDA_VISIBLE_DEVICES deepspeed --num_accelerators 2 --master_port 29512",
    "accelerate": "accelerate launch --use_deepspeed --deepspeed_config_file $CONFIG --num_processes 2 --main_process_port 29513",
    "none": "env SLURM_NTASKS=1 python",
}


def test_every_launcher_trains_alike(cluster: Cluster, settings: dict[str, str], tmp_path: Path) -> None:
    """Three steps of the same four rows: two ranks of two rows each, wherever they are, or one of four. And what the doctor says there."""
    lines = ["#!/bin/bash", "#SBATCH --nodes=2 --ntasks-per-node=1 --gpus-per-node=2 --cpus-per-task=2"]
    for name, start in LAUNCHERS.items():
        rows = "--per_device_train_batch_size 4" if name == "none" else ""
        lines.append(f"{start} launch/train.py $TRAIN {rows} --output_dir {tmp_path / name} &> {tmp_path / name}.log")
    lines.append(f"srun python -m grass_ds doctor --json --shared_path {tmp_path} > {tmp_path / 'doctor.json'}")
    script = tmp_path / "launchers.sbatch"
    script.write_text("\n".join(lines) + "\n")
    common = f"--deepspeed {settings['CONFIG']} --model {settings['MODEL']} {arguments(3)} --disable_tqdm true"
    cluster.submit(script, "launchers", TRAIN=common, **settings).wait(240)

    logs = {name: (tmp_path / f"{name}.log").read_text() for name in LAUNCHERS}
    losses = {name: [float(loss) for loss in re.findall(r"of 3: loss ([\d.]+)", log)] for name, log in logs.items()}
    for name, found in losses.items():
        assert len(found) == 3, logs[name][-4000:]
        assert json.loads((tmp_path / name / "report.json").read_text())["ranks"] == (1 if name == "none" else 2)
        if name == "none":
            # Four rows on one rank are other sums in bfloat16 than two on each of two. A logit rounds by up to the unit roundoff of itself,
            # a loss is a difference of logits, and those of an untrained model are smaller than it.
            assert found == pytest.approx(losses["srun"], rel=torch.finfo(torch.bfloat16).eps / 2)
        else:
            assert_same_run(tmp_path / name, tmp_path / "srun")
    doctor = json.loads((tmp_path / "doctor.json").read_text())
    found = [(rank["rank"], rank["host"], rank["local_rank"]) for rank in doctor["ranks"]]
    assert found == [(0, "n1", 0), (1, "n2", 0)]
    assert doctor["status"] != "FAIL"
