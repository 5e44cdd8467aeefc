# SPDX-License-Identifier: Apache-2.0
"""What fails after training finds the trained weights on disk, and says where; each case is launch/train.py in a process of its own."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.programs import run_forked
from transformers import AutoModelForCausalLM

STEPS = 4

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def fail(error: type[Exception]) -> None:
    raise error("an injected fault")


def break_measure(train: Any, rank: int = 0) -> None:
    """Measuring works before training, and on the other ranks."""
    measure, calls = train.measure, []

    def measured(*args: Any) -> Any:
        calls.append(args)
        broken = len(calls) > 1 and int(os.environ["RANK"]) == rank
        return fail(ValueError) if broken else measure(*args)

    train.measure = measured


def break_report(train: Any) -> None:
    train.report.save = lambda *_: fail(TypeError)


def break_last_log_line(train: Any) -> None:
    on_log = train.TerminalLines.on_log

    def logged(self: Any, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        if state.global_step == STEPS:
            fail(OSError)
        on_log(self, args, state, *more, **kwargs)

    train.TerminalLines.on_log = logged


FAULTS = {
    "measure": break_measure,
    "report": break_report,
    "log": break_last_log_line,
    "rank-1": partial(break_measure, rank=1),
}
RANKS = {"rank-1": 2}


def train_with(fault: str, model: Path, folder: Path) -> None:
    from launch import train

    FAULTS[fault](train)
    options = ["--deepspeed", "ds_configs/lisa.json", "--model", str(model), "--output_dir", str(folder / "out")]
    options += ["--max_steps", str(STEPS), "--logging_steps", "1", "--eval_samples", "2", "--train_samples", "16"]
    sys.argv = ["launch/train.py", *options, "--max_new_tokens", "2", "--disable_tqdm", "true"]
    sys.exit(train.main())


def test_whatever_fails_after_training_the_model_is_saved(model_folder: Path, tmp_path: Path) -> None:
    folders = {fault: tmp_path / fault for fault in FAULTS}
    started = {}
    for fault, folder in folders.items():
        folder.mkdir()
        started[folder] = (RANKS.get(fault, 1), partial(train_with, fault, model_folder, folder))
    codes = run_forked(started)
    before = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    saved = {}
    for fault, folder in folders.items():
        said = (folder / "log").read_text()
        assert codes[folder] == [1] * RANKS.get(fault, 1), (fault, said[-3000:])
        assert said.count(f"the trained model is in {folder / 'out'};") == 1, (fault, said[-3000:])
        assert "an injected fault" in said[said.index("the trained model is in") :]
        assert not (folder / "out" / "report.json").exists()
        saved[fault] = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
        assert any(not torch.equal(before[name], saved[fault][name]) for name in before), fault
    for name in before:  # the weights of the last step, whenever the run failed after it
        assert torch.equal(saved["measure"][name], saved["report"][name])
        assert torch.equal(saved["measure"][name], saved["log"][name])
