# SPDX-License-Identifier: Apache-2.0
"""wandb over requeues and crashes: one run, every step once; and training goes on when wandb does not."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.wandb_runs import read_history, records
from transformers import TrainerControl, TrainerState, TrainingArguments

from grass_ds.cluster.preemption import PREEMPTED
from launch import tracking

wandb = pytest.importorskip("wandb")
wandb_module = pytest.importorskip("wandb.sdk.lib.module")

BLOCK = 32768  # what the service of wandb writes at once
COLUMNS = {f"grass/prob/{layer:02d}": layer / 7 for layer in range(100)}


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "RUN_GROUP": "sweep"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield
    with contextlib.suppress(ConnectionError):
        wandb.finish()
    with contextlib.suppress(ConnectionError):
        wandb.teardown()  # else the variables of its first start stay
    wandb_module.unset_globals()


class Job:
    """One start of a job: what the Trainer does with its wandb callback on one rank.

    Args:
        folder: --output_dir.
        resuming: --resume_from_checkpoint was given.
        at: step of the checkpoint, whose logs are those of all steps up to it.
        rank: global rank.
    """

    def __init__(self, folder: Path, resuming: bool, at: int = 0, rank: int = 0) -> None:
        self.args = TrainingArguments(output_dir=str(folder / "out"), report_to=[], use_cpu=True)
        self.state = TrainerState(global_step=at, is_world_process_zero=rank == 0)
        self.state.log_history = [self.logs(step) | {"step": step} for step in range(1, at + 1)]
        self.callback = tracking.WandbRun(resuming)
        self.callback.on_train_begin(self.args, self.state, TrainerControl())

    @staticmethod
    def logs(step: int) -> dict[str, float]:
        return {"loss": 1 / step}

    def train(self, until: int) -> None:
        for step in range(self.state.global_step + 1, until + 1):
            self.state.global_step = step
            self.callback.on_log(self.args, self.state, TrainerControl(), logs=self.logs(step) | COLUMNS)


def file_of(folder: Path, run_id: str, part: int) -> Path:
    """The file of the latest start, in a folder named for its turn: two starts in one second would share the name."""
    [latest] = folder.glob(f"wandb/offline-run-20*_*-{run_id}")
    return latest.rename(latest.with_name(f"offline-run-{part}-{run_id}")) / f"run-{run_id}.wandb"


def test_requeues_and_crashes_make_one_run_with_every_step_once(tmp_path: Path) -> None:
    job = Job(tmp_path, resuming=True)  # as a job script that is always started the same: there is no checkpoint yet
    run_id = wandb.run.id
    assert wandb.run.group == "sweep"
    job.train(until=40)
    tracking.finish(1)
    crashed = file_of(tmp_path, run_id, 1)
    assert [row["train/global_step"] for row in read_history(crashed)] == list(range(1, 41))
    os.truncate(crashed, crashed.stat().st_size // BLOCK * BLOCK)
    [*_, stored] = [row["train/global_step"] for kind, row in records(crashed) if kind == "history"]
    assert 20 < stored < 40

    at_once = crashed.parent.with_name(f"offline-run-2-{run_id}") / crashed.name
    at_once.parent.mkdir()
    at_once.write_bytes(crashed.read_bytes()[:7])

    job = Job(tmp_path, resuming=True, at=20)  # computes steps again that are stored
    job.train(until=45)
    tracking.finish(PREEMPTED)
    preempted = file_of(tmp_path, run_id, 3)
    assert [row["train/global_step"] for row in read_history(preempted)] == list(range(stored + 1, 46))
    assert "preempting" in [kind for kind, _ in records(preempted)]
    assert not at_once.exists(), "wandb sync refuses a file without a record"

    Job(tmp_path, resuming=True, at=50).train(until=52)  # the rows between had gone with the service
    tracking.finish(0)
    rows = read_history(file_of(tmp_path, run_id, 4))
    assert [row["train/global_step"] for row in rows] == list(range(46, 53))
    assert [row["train/loss"] for row in rows] == pytest.approx([1 / step for step in range(46, 53)])

    Job(tmp_path, resuming=False).train(until=1)
    assert wandb.run.id != run_id
    assert json.loads((tmp_path / "out" / tracking.RUN_FILE).read_text()) == {"id": wandb.run.id}


def test_the_users_own_id_wins_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    Job(tmp_path, resuming=False)
    assert wandb.run.id == "mine"
    wandb.finish()
    file_of(tmp_path, "mine", 1)
    monkeypatch.delenv("WANDB_RUN_ID")
    Job(tmp_path, resuming=True)
    assert wandb.run.id == "mine"


def test_other_ranks_leave_wandb_alone(tmp_path: Path) -> None:
    Job(tmp_path, resuming=False, rank=1).train(until=2)
    tracking.finish(0)
    assert wandb.run is None
    assert not list(tmp_path.iterdir())


def service() -> int:
    """Process id of wandb's service."""
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            number, name, _, parent = status.read_text().split()[:4]
            if name == "(wandb-core)" and int(parent) == os.getpid():
                return int(number)
    raise AssertionError("the service of wandb does not run")


def test_training_survives_the_end_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clusters send SIGTERM to every process of a job, and it ends wandb's."""
    warnings: list[str] = []
    monkeypatch.setattr(tracking.logger, "warning", warnings.append)
    job = Job(tmp_path, resuming=False)
    job.train(until=2)
    os.kill(service(), signal.SIGTERM)
    wandb.setup()._connection._proc.join()
    job.train(until=5)
    job.callback.on_train_end(job.args, job.state, TrainerControl())
    assert len(warnings) == 1
    assert "goes on without it" in warnings[0]
    tracking.finish(PREEMPTED)


@pytest.mark.parametrize(
    ("name", "value"), [("MODE", ""), ("MODE", "ofline"), ("RESUME", "yes"), ("RUN_ID", "a/b"), ("RUN_ID", "")]
)
def test_a_bad_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    tracking.check(["wandb"])
    monkeypatch.setenv(f"WANDB_{name}", value)
    tracking.check(["tensorboard"])
    with pytest.raises(ValueError, match=f"WANDB_{name}='{value}'.*unset WANDB_{name}"):
        tracking.check(["wandb"])
