# SPDX-License-Identifier: Apache-2.0
"""A long run that goes on from its own checkpoints (cases of kind ``epoch``)."""

import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Case, Row
from benchmarks.measure.engine import build, micro_step, trainable_numel
from benchmarks.measure.observer import memory, peak_bytes
from benchmarks.tasks import TASKS, Exam
from launch import distributed
from launch.data.chat_template import Template
from launch.data.tokenization import Collator

SAVE_EVERY = 11  # optimizer steps
DEV_ROWS = 48

Batch = Mapping[str, torch.Tensor]


@dataclass
class Progress:
    """What a run has measured so far. It is part of its checkpoints.

    Attributes:
        losses: mean over the micro-batches of a step, before that step.
        active: layers of each step, None while probing.
        curve: development loss after some steps.
        starts: how often the run was started.
        cpu_seconds, wall_seconds: of the steps alone.
    """

    losses: list[float] = field(default_factory=list)
    active: list[list[int] | None] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    starts: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    tokens: int = 0
    trainable: int = 0
    peak_bytes: float = 0.0


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
        _step(engine, batches, progress)
        if number % case.curve == 0:
            progress.curve.append({"step": number, "dev_loss": exam.loss(model, "dev")})
        if number % SAVE_EVERY == 0 or number == case.steps:
            _save(engine, folder, progress)
    row = {"data": exam.fingerprint(), "train_rows": exam.train_rows, "dev_rows": len(exam.dev)}
    row |= {"test_rows": len(exam.test), "test_loss": exam.loss(model, "test"), "accuracy": exam.accuracy(model)}
    row |= {**asdict(progress), "bytes": memory(engine), "skipped_steps": engine.skipped_steps}
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


def _step(engine: Any, batches: list[Batch], progress: Progress) -> None:
    grass = engine.grass
    probing = grass is not None and grass.phase == "probe"
    if grass is not None:
        progress.active.append(None if probing else list(grass.active_layers))
    if not probing:
        progress.trainable = trainable_numel(engine)
    began, began_cpu, losses = time.perf_counter(), time.process_time(), []
    for batch in batches:
        progress.tokens += int(batch["attention_mask"].sum())
        losses.append(micro_step(engine, {name: value.to(engine.device) for name, value in batch.items()})["loss"])
    progress.cpu_seconds += time.process_time() - began_cpu
    progress.wall_seconds += time.perf_counter() - began
    progress.losses.append(sum(losses) / len(losses))
    progress.peak_bytes = max(progress.peak_bytes, distributed.max_over_ranks(peak_bytes()))


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
