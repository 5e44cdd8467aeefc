# SPDX-License-Identifier: Apache-2.0
"""What a method reaches on a task in a given number of steps (cases of kind ``quality``)."""

from pathlib import Path
from typing import Any

from benchmarks.case import Case, Row
from benchmarks.measure.engine import build
from benchmarks.measure.observer import memory
from benchmarks.measure.progress import Progress
from benchmarks.tasks import TASKS, Exam
from launch import distributed
from launch.data.chat_template import Template
from launch.data.tokenization import Collator


def quality(case: Case, model: Any, tokenizer: Any) -> Row:
    """Train and measure; without steps, the untrained model.

    Cases may run side by side, so time is CPU time of the steps (seconds of this process, all its threads).
    """
    data = Path(case.data) if case.data else None
    exam = Exam(TASKS[str(case.task)], Template.choose(tokenizer), data, case.test_rows)
    row: Row = {"data": exam.fingerprint(), "train_rows": exam.train_rows}
    row |= {"dev_rows": len(exam.dev), "test_rows": len(exam.test)}
    if case.steps:
        row |= _train(case, model, exam, Collator(tokenizer.pad_token_id))
    row["dev_loss"] = exam.loss(model, "dev")
    if not case.tuning:
        row["test_loss"] = exam.loss(model, "test")
    if case.answers and not case.tuning:
        row["accuracy"] = exam.accuracy(model)
        row["constant"] = exam.constant()
    return row


def _train(case: Case, model: Any, exam: Exam, collate: Collator) -> Row:
    engine, _ = build(case, model)
    grass, batches, run = engine.grass, exam.batches(case.seed), Progress()
    batch_shapes, drawn = [], []
    for number in range(1, case.steps + 1):
        batch = collate(next(batches))
        batch_shapes.append(list(batch["input_ids"].shape))
        if case.ramp:
            _ramp(engine, case.ramp, case.grass["sample_period"])
        run.step(engine, [batch])
        scores = list(grass.scores) if grass is not None and grass.scores else None
        if scores is not None and (not drawn or drawn[-1]["scores"] != scores):
            drawn.append({"step": number, "scores": scores, "probabilities": list(grass.probabilities or [])})
        if case.curve and number % case.curve == 0 and number < case.steps:  # the last loss is the row's
            point = {"step": number, "cpu_seconds": run.cpu_seconds, "dev_loss": exam.loss(model, "dev")}
            run.curve.append(point)
    return {
        "train_losses": run.losses,
        "tokens": run.tokens,
        "batches": batch_shapes,
        "cpu_seconds": run.cpu_seconds,
        "wall_seconds": run.wall_seconds,
        "curve": run.curve,
        "active": run.active,
        "scores": drawn,
        "peak_bytes": distributed.max_over_ranks(run.peak_bytes),
        "bytes": memory(engine),
        "trainable": run.trainable,
        "skipped_steps": engine.skipped_steps,
    }


def _ramp(engine: Any, steps: int, period: int) -> None:
    """Lower the rate of the coming step, the less the longer ago the draw was; the scheduler sets it anew each time.

    For samplers that do not probe.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] *= min(1.0, (engine.global_steps % period + 1) / steps)
