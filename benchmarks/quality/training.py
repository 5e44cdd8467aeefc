# SPDX-License-Identifier: Apache-2.0
"""What a method reaches on a task in a given number of steps (cases of kind ``quality``)."""

import time
from pathlib import Path
from typing import Any

from benchmarks.case import Case, Row
from benchmarks.measure.engine import build, micro_step, trainable_numel
from benchmarks.measure.observer import memory, peak_bytes, reset_peak
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
    grass, batches = engine.grass, exam.batches(case.seed)
    losses, batch_shapes, active, curve, drawn = [], [], [], [], []
    tokens = peak = trainable = 0
    cpu = wall = 0.0
    reset_peak()
    for number in range(1, case.steps + 1):
        batch = collate(next(batches))
        tokens += int(batch["attention_mask"].sum())
        batch_shapes.append(list(batch["input_ids"].shape))
        probing = grass is not None and grass.phase == "probe"
        if grass is not None:
            active.append(None if probing else list(grass.active_layers))
        if not probing:
            trainable = trainable_numel(engine)
        began, began_cpu = time.perf_counter(), time.process_time()
        losses.append(micro_step(engine, {name: value.to(engine.device) for name, value in batch.items()})["loss"])
        cpu, wall = cpu + time.process_time() - began_cpu, wall + time.perf_counter() - began
        scores = list(grass.scores) if grass is not None and grass.scores else None
        if scores is not None and (not drawn or drawn[-1]["scores"] != scores):
            drawn.append({"step": number, "scores": scores, "probabilities": list(grass.probabilities or [])})
        if case.curve and number % case.curve == 0 and number < case.steps:  # the last loss is the row's
            peak = max(peak, peak_bytes())
            curve.append({"step": number, "cpu_seconds": cpu, "dev_loss": exam.loss(model, "dev")})
            reset_peak()
    return {
        "train_losses": losses,
        "tokens": tokens,
        "batches": batch_shapes,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "curve": curve,
        "active": active,
        "scores": drawn,
        "peak_bytes": distributed.max_over_ranks(max(peak, peak_bytes())),
        "bytes": memory(engine),
        "trainable": trainable,
        "skipped_steps": engine.skipped_steps,
    }
