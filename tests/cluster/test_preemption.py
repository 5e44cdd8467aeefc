# SPDX-License-Identifier: Apache-2.0
"""Signals are remembered, and all ranks act on them in the same step."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed import comm as dist
from helpers.ranks import RankPool
from helpers.traffic import Collectives
from torch.utils.data import DataLoader, Dataset

import grass_ds
from grass_ds.trainer.preemption_callback import PreemptionCallback

ROOT = Path(__file__).resolve().parents[2]
UNUSED: Any = (None, None, None)


def steps_until_agreed(signalled: dict[int, int]) -> dict[str, Any]:
    """Ten steps, in which rank r is signalled in step ``signalled[r]``, three times: schedulers repeat themselves."""
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    preemption = grass_ds.Preemption()
    answers, cost = [], []
    for step in range(10):
        if signalled.get(dist.get_rank()) == step:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
        with Collectives() as sent:
            answers.append(preemption.agreed())
        cost.append(len(sent.calls))
        assert all(call == ("allreduce", 8) for call in sent.calls)
    reason = preemption.reason
    preemption.close()
    restored = (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
    return {"answers": answers, "cost": cost, "reason": reason, "restored": restored}


@pytest.mark.dist
def test_all_ranks_agree_in_the_step_in_which_the_first_was_signalled(two_ranks: RankPool) -> None:
    for result in two_ranks.run(steps_until_agreed, signalled={0: 7, 1: 4}):
        assert result["answers"] == [False] * 4 + [True] * 6
        assert result["cost"] == [1] * 5 + [0] * 5  # one number per step until then
        assert (result["reason"], result["restored"]) == ("SIGTERM", True)


def test_one_process_asks_nobody() -> None:
    preemption = grass_ds.Preemption([signal.SIGUSR1])
    try:
        assert not preemption.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.agreed()
        assert preemption.reason == "SIGUSR1"
    finally:
        preemption.close()
    assert grass_ds.PREEMPTED == 75


def test_the_callback_saves_and_stops_and_puts_off_the_evaluation() -> None:
    control = SimpleNamespace(should_save=False, should_training_stop=False, should_evaluate=True)
    preemption: Any = SimpleNamespace(agreed=lambda: False, reason="")
    state = SimpleNamespace(global_step=3, max_steps=9)
    callback, event = PreemptionCallback(preemption), (None, state, control)
    callback.on_step_end(*event)  # type: ignore[arg-type]
    callback.on_epoch_end(*event)  # type: ignore[arg-type]
    assert vars(control) == {"should_save": False, "should_training_stop": False, "should_evaluate": True}
    preemption.agreed, preemption.reason = lambda: True, "SIGUSR1"
    callback.on_step_end(*event)  # type: ignore[arg-type]
    assert vars(control) == {"should_save": True, "should_training_stop": True, "should_evaluate": False}
    control.should_evaluate = True  # with save_strategy and eval_strategy "epoch"
    callback.on_epoch_end(*event)  # type: ignore[arg-type]
    assert vars(control) == {"should_save": False, "should_training_stop": True, "should_evaluate": False}
    state.global_step = 9  # the last, which ends training in any case: a Trainer that resumed from it would train more
    callback.on_step_end(*event)  # type: ignore[arg-type]
    assert not control.should_save


PROGRAM = """
import os, signal, sys
from grass_ds.cluster.preemption import Preemption
preemption = Preemption()
os.kill(os.getpid(), signal.SIGUSR1)
preemption.agreed()
print("ending", flush=True)
sys.exit(preemption.end())
"""


def test_the_exit_code_survives_the_sigterm_that_the_first_to_end_causes() -> None:
    """Launchers send it to the others, whose Python may have given its handlers up by then."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "ending\n"
    deadline = time.monotonic() + 30
    while program.poll() is None and time.monotonic() < deadline:
        program.send_signal(signal.SIGTERM)
        time.sleep(0.001)
    assert program.wait(1) == grass_ds.PREEMPTED


class Rows(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return os.getpid() if index < 3 else index


def test_processes_that_load_data_survive_the_signals() -> None:
    loader = DataLoader(Rows(), batch_size=None, num_workers=1, prefetch_factor=1, multiprocessing_context="fork")
    PreemptionCallback(grass_ds.Preemption([])).on_train_begin(*UNUSED, train_dataloader=loader)
    batches = iter(loader)
    worker = int(next(batches))
    assert worker != os.getpid()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker, number)
    assert list(batches) == [worker, worker, 3]


def test_a_forked_process_can_still_be_ended() -> None:
    """By SIGTERM, whose handler it has inherited; SIGUSR1 is not meant for it."""
    preemption = grass_ds.Preemption()
    try:
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        child.start()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGUSR1)
        child.join(0.3)
        assert child.is_alive()
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
    finally:
        preemption.close()
    assert not preemption.received
