# SPDX-License-Identifier: Apache-2.0
"""What a method reaches on a task in a given number of steps (cases of kind ``quality``)."""

import time
from pathlib import Path
from typing import Any

from benchmarks.case import Case
from benchmarks.measure.engine import build, micro_step, trainable_numel
from benchmarks.measure.observer import memory, peak_bytes, reset_peak
from benchmarks.quality.layer_ablation import train_each_layer
from benchmarks.quality.scores import REPROBE_BATCHES, ScoreProbe
from benchmarks.tasks import TASKS, Exam
from launch import distributed
from launch.data.chat_template import Template
from launch.data.tokenization import Collator

REPROBE_SEED = 77  # of batches that no run trains on in this order


def quality(case: Case, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Train and measure; without steps, the untrained model.

    Cases may run side by side, so time is CPU time of the steps (seconds of this process, all its threads).
    """
    exam = Exam(
        TASKS[str(case.task)], Template.choose(tokenizer), Path(case.data) if case.data else None, case.test_rows
    )
    row: dict[str, Any] = {"data": exam.fingerprint(), "train_rows": exam.train_rows}
    row |= {"dev_rows": len(exam.dev), "test_rows": len(exam.test)}
    collate = Collator(tokenizer.pad_token_id)
    probe = None
    if case.reprobe:
        others = exam.batches(REPROBE_SEED)
        probe = ScoreProbe(model, [collate(next(others)) for _ in range(REPROBE_BATCHES)])
    if case.ablate_layers:
        batches = exam.batches(case.seed)
        some = [collate(next(batches)) for _ in range(case.ablate_layers)]
        ablation = train_each_layer(model, some, case.lr, lambda trained: exam.loss(trained, "dev"))
        row["worth"] = {"steps": case.ablate_layers, **ablation}
    if case.steps:
        row |= _train(case, model, exam, collate, probe)
    row["dev_loss"] = exam.loss(model, "dev")
    if not case.tuning:
        row["test_loss"] = exam.loss(model, "test")
        row["accuracy"] = exam.accuracy(model)
        row["constant"] = exam.constant()
    return row


def _train(case: Case, model: Any, exam: Exam, collate: Collator, probe: ScoreProbe | None) -> dict[str, Any]:
    engine, _ = build(case, model)
    grass, batches = engine.grass, exam.batches(case.seed)
    losses, batch_shapes, active, curve, drawn, reprobes = [], [], [], [], [], []
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
        if probe is not None and scores is not None and (not reprobes or number % case.reprobe == 0):
            reprobes.append({"step": number, "scores": scores, "true": probe.measure(model)})
        if case.curve and number % case.curve == 0:
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
        **({"reprobes": reprobes} if case.reprobe else {}),
        "peak_bytes": distributed.max_over_ranks(max(peak, peak_bytes())),
        "bytes": memory(engine),
        "trainable": trainable,
        "skipped_steps": engine.skipped_steps,
    }
