# SPDX-License-Identifier: Apache-2.0
"""Suite ``epoch``: a run that is interrupted ends as one that is not."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.models import tiny_llama
from helpers.ranks import RankPool
from transformers import PreTrainedTokenizerBase

from benchmarks.case import Case
from benchmarks.epoch import training
from benchmarks.measure.progress import Progress
from launch.model import load_tokenizer

STEPS, INTERRUPTED = 5, 4
GRASS = {"probe_steps": 1, "sample_period": 2, "num_active_layers": 1}
FROM_GIT = {
    "commit": "0123abc",
    "jobs": 1,
    "versions": {"torch": "2"},
    "device": "cpu",
    "hardware": "any",
    "threads": 1,
}


def train(case: Case, tokenizer: PreTrainedTokenizerBase, interrupted: bool) -> Any:
    model, step = tiny_llama(layers=3), Progress.step
    model.resize_token_embeddings(len(tokenizer))

    def at_most(progress: Progress, engine: Any, batches: Any) -> None:
        if interrupted and len(progress.losses) == INTERRUPTED - 1:
            raise KeyboardInterrupt
        step(progress, engine, batches)

    with mock.patch.object(training, "SAVE_EVERY", 2), mock.patch.object(Progress, "step", at_most):
        try:
            return training.epoch(case, model, tokenizer)
        except KeyboardInterrupt:
            return None


@pytest.mark.dist
@pytest.mark.parametrize("method", ["grass", pytest.param("lora", marks=pytest.mark.all)])
def test_an_interrupted_run_ends_as_another(one_rank: RankPool, tmp_path: Path, method: str) -> None:
    shape = {"micro_batch": 2, "accumulation": 2, "sequence": 128, "test_rows": 4}
    case = Case(kind="epoch", task="builtin", method=method, lr=1e-2, steps=STEPS, curve=3, schedule="cosine", **shape)
    case = Case(
        **{**vars(case), "grass": GRASS if method == "grass" else {}, "dtype": "fp32", "disk": str(tmp_path / "disk")}
    )
    given = {"case": case, "tokenizer": load_tokenizer()}  # here: a rank may not start the process that converts it
    (whole,) = one_rank.run(train, **given, interrupted=False)
    assert one_rank.run(train, **given, interrupted=True) == [None]
    (kept,) = tmp_path.iterdir()
    assert [path.name for path in kept.iterdir() if path.is_dir()] == ["step2"]
    (resumed,) = one_rank.run(train, **given, interrupted=False)
    assert list(tmp_path.iterdir()) == []
    measured = ("losses", "active", "curve", "tokens", "test_loss", "accuracy", "trainable")
    assert [resumed[name] for name in measured] == [whole[name] for name in measured]
    assert (whole["starts"], resumed["starts"]) == (1, 2)
    assert len(whole["losses"]) == STEPS and whole["losses"][-1] < whole["losses"][0]
    assert [point["step"] for point in whole["curve"]] == [3]
    assert resumed["cpu_seconds"] > 0
