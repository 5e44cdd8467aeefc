# SPDX-License-Identifier: Apache-2.0
"""A long run that goes on from its own checkpoints (cases of kind ``epoch``)."""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Row
from benchmarks.measure.engine import build
from benchmarks.measure.observer import memory
from benchmarks.measure.progress import Batch, Progress
from benchmarks.tasks import TASKS, Exam
from launch import distributed
from launch.data.chat_template import Template
from launch.data.tokenization import Collator

SAVE_EVERY = 11  # optimizer steps
DEV_ROWS = 48


def epoch(case: Case, model: Any, tokenizer: Any) -> Row:
    """Train through the rows, measure, and delete the checkpoints."""
    data = Path(case.data) if case.data else None
    exam = Exam(TASKS[str(case.task)], Template.choose(tokenizer), data, case.test_rows)
    exam.dev = exam.dev[:DEV_ROWS]
    # Beside the folder of this run of the program, which is deleted with it.
    folder = Path(str(case.disk)).parent / sha256(case.text().encode()).hexdigest()[:16]
    engine, _ = build(case, model)
    progress = _resume(engine, folder)
    progress.starts += 1
    steps = islice(_steps(case, exam, Collator(tokenizer.pad_token_id)), len(progress.losses), case.steps)
    for number, batches in enumerate(steps, len(progress.losses) + 1):
        progress.step(engine, batches)
        if number % case.curve == 0:
            progress.curve.append({"step": number, "dev_loss": exam.loss(model, "dev")})
        if number % SAVE_EVERY == 0 or number == case.steps:
            _save(engine, folder, progress)
    row = {"data": exam.fingerprint(), "train_rows": exam.train_rows, "dev_rows": len(exam.dev)}
    row |= {"test_rows": len(exam.test), "test_loss": exam.loss(model, "test"), "accuracy": exam.accuracy(model)}
    row |= {
        **asdict(progress),
        "peak_bytes": distributed.max_over_ranks(progress.peak_bytes),
        "bytes": memory(engine),
        "skipped_steps": engine.skipped_steps,
    }
    shutil.rmtree(folder, ignore_errors=True)
    return row


def _steps(case: Case, exam: Exam, collate: Collator) -> Iterator[list[Batch]]:
    """The micro-batches of every step. Rows of a step are sorted by length, so that less of them is padding."""
    rows = case.micro_batch * case.accumulation
    order = torch.randperm(len(exam.train), generator=torch.Generator().manual_seed(case.seed)).tolist()
    for first in range(0, len(order) - rows + 1, rows):
        mine = sorted(
            (exam.train[index] for index in order[first : first + rows]), key=lambda row: len(row["input_ids"])
        )
        yield [collate(mine[begin : begin + case.micro_batch]) for begin in range(0, rows, case.micro_batch)]


def _save(engine: Any, folder: Path, progress: Progress) -> None:
    """Write a checkpoint, and delete the one before."""
    tag = f"step{len(progress.losses)}"
    engine.save_checkpoint(folder, tag=tag, client_state={"progress": asdict(progress)})
    for old in folder.iterdir():
        if old.is_dir() and old.name != tag:
            shutil.rmtree(old)


def _resume(engine: Any, folder: Path) -> Progress:
    if not (folder / "latest").exists():
        return Progress()
    _, client_state = engine.load_checkpoint(folder)
    return Progress(**client_state["progress"])
