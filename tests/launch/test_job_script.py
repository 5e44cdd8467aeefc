# SPDX-License-Identifier: Apache-2.0
"""slurm/job.sh: what it starts, which ends of a run go back to the queue. With stand-ins for srun and scontrol; test_slurm.py has the real ones."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/bin/bash
save() { mkdir -p "$OUTPUT/checkpoint-$SAVES"; }
trap '[ -z "$SAVES" ] || save; exit $CODE' USR1
echo "$@" > "$OUTPUT/started"
if [ "$ASKED" = 1 ]; then for _ in {1..200}; do sleep 0.05; done; fi
exit $CODE
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$OUTPUT/queue"
"""
JOB = 'source slurm/job.sh; run_and_requeue "${SRUN[@]}" python "${TRAIN[@]}"'
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "grass", "SLURM_NNODES": "1"}
ENVIRONMENT = {**os.environ, "ASKED": "0", "SAVES": "", "VENV": "none", "METHOD": "", "CONFIG": "", **SLURM}

ENDS = {
    "finished": ({"CODE": "0"}, None),
    "failed": ({"CODE": "1"}, None),
    "finished-though-asked": ({"CODE": "0", "ASKED": "1"}, None),
    "saved": ({"CODE": "75", "ASKED": "1", "SAVES": "5"}, "requeue 7"),
    "saved-for-the-steps-alone": ({"CODE": "75"}, "requeue 7"),
    "rank-lost": ({"CODE": "76"}, "requeue 7"),
    "asked-before-python-could-note-it": ({"CODE": "138", "ASKED": "1"}, "requeue 7"),
    "saved-and-crashed": ({"CODE": "143", "ASKED": "1", "SAVES": "5"}, "requeue 7"),
    "crashed-before-it-saved": ({"CODE": "143", "ASKED": "1"}, None),
    "task-of-an-array": (
        {"CODE": "75", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_RESTART_COUNT": "3"},
        "requeue 7_2",
    ),
    "too-often": ({"CODE": "75", "SLURM_RESTART_COUNT": "4", "MAX_RESTARTS": "4"}, None),
}


def stand_ins(folder: Path, settings: dict[str, str]) -> dict[str, str]:
    """The environment of a job that finds them first."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {**ENVIRONMENT, "OUTPUT": str(folder), **settings, "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, "--deepspeed ds_configs/grass.json"),
        ({"CONFIG": "my.json"}, "--deepspeed my.json"),
        ({"METHOD": "lora"}, "--method lora"),  # which picks its configuration
        ({"METHOD": "lisa", "CONFIG": "my.json"}, "--method lisa --deepspeed my.json"),
    ],
)
def test_method_and_configuration_are_handed_on(tmp_path: Path, settings: dict[str, str], options: str) -> None:
    environment = stand_ins(tmp_path, {"CODE": "0", **settings})
    subprocess.run(["bash", "-c", JOB], cwd=ROOT, env=environment, check=True, timeout=20)
    command = (tmp_path / "started").read_text()
    assert f" python launch/train.py {options} --output_dir {tmp_path} --resume_from_checkpoint true" in command


@pytest.mark.parametrize("case", ENDS)
def test_what_goes_back_to_the_queue(tmp_path: Path, case: str) -> None:
    settings, requeued = ENDS[case]
    environment = stand_ins(tmp_path, settings)
    job = subprocess.Popen(["bash", "-c", JOB], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    try:
        if environment["ASKED"] == "1":
            deadline = time.monotonic() + 20
            while not (tmp_path / "started").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == int(settings["CODE"])
    finally:
        job.kill()
    asked = tmp_path / "queue"
    assert (asked.read_text().strip() if asked.exists() else None) == requeued


def test_a_missing_environment_ends_the_job() -> None:
    environment = {**ENVIRONMENT, "VENV": "no/such"}
    done = subprocess.run(["bash", "-c", JOB], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "VENV=no/such: no such environment" in done.stderr
