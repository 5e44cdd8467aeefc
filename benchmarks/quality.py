# SPDX-License-Identifier: Apache-2.0
"""Cells of kind ``quality``: what a method reaches in a given number of steps on a task."""

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.engines import build, step, trainable_numel
from benchmarks.meters import peak_bytes, reset_peak
from benchmarks.observed import memory
from benchmarks.staleness import REPROBE_BATCHES, Reprobe
from benchmarks.tasks import TASKS, Exam
from benchmarks.worth import layer_worth
from launch import distributed
from launch.data.chat_template import Template
from launch.data.tokenization import Collator

REPROBE_SEED = 77  # of batches that no run is trained on in this order


def quality(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Train ``steps`` steps and measure; with no steps, the untrained model.

    One process per cell: cells that run side by side share cores, so that time is CPU time of the steps (seconds of this process, all its
    threads), which on a free core is wall time.
    """
    exam = Exam(TASKS[args.task], Template.choose(tokenizer), Path(args.data) if args.data else None, args.test_rows)
    row: dict[str, Any] = {"data": exam.fingerprint(), "train_rows": exam.train_rows}
    row |= {"dev_rows": len(exam.dev), "test_rows": len(exam.test)}
    collate = Collator(tokenizer.pad_token_id)
    reprobe = None
    if args.reprobe:
        others = exam.batches(REPROBE_SEED)
        reprobe = Reprobe(model, [collate(next(others)) for _ in range(REPROBE_BATCHES)])
    if args.worth:
        batches = exam.batches(args.seed)
        some = [collate(next(batches)) for _ in range(args.worth)]
        row["worth"] = {
            "steps": args.worth,
            **layer_worth(model, some, args.lr, lambda trained: exam.loss(trained, "dev")),
        }
    if args.steps:
        row.update(_train(args, build(args, model), model, exam, collate, reprobe))
    row["dev_loss"] = exam.loss(model, "dev")
    if not args.tuning:
        row["test_loss"] = exam.loss(model, "test")
        row["accuracy"] = exam.accuracy(model)
        row["constant"] = exam.constant()
    return row


def _train(
    args: argparse.Namespace, engine: Any, model: Any, exam: Exam, collate: Collator, reprobe: Reprobe | None
) -> dict[str, Any]:
    grass, batches = engine.grass, exam.batches(args.seed)
    losses, batch_shapes, active, curve, drawn, reprobes = [], [], [], [], [], []
    tokens = peak = trainable = 0
    cpu = wall = 0.0
    reset_peak()
    for number in range(1, args.steps + 1):
        batch = collate(next(batches))
        tokens += int(batch["attention_mask"].sum())
        batch_shapes.append(list(batch["input_ids"].shape))
        probing = grass is not None and grass.phase == "probe"
        if grass is not None:
            active.append(None if probing else list(grass.active_layers))
        if not probing:
            trainable = trainable_numel(engine)
        began, began_cpu = time.perf_counter(), time.process_time()
        losses.append(step(engine, {name: value.to(engine.device) for name, value in batch.items()})["loss"])
        cpu, wall = cpu + time.process_time() - began_cpu, wall + time.perf_counter() - began
        if grass is not None and grass.scores and (not drawn or drawn[-1]["scores"] != list(grass.scores)):
            drawn.append(
                {"step": number, "scores": list(grass.scores), "probabilities": list(grass.probabilities or [])}
            )
        if reprobe is not None and grass.scores and (not reprobes or number % args.reprobe == 0):
            reprobes.append({"step": number, "scores": list(grass.scores), "true": reprobe.measure(model)})
        if args.curve and number % args.curve == 0:
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
        **({"reprobes": reprobes} if args.reprobe else {}),
        "peak_bytes": distributed.max_over_ranks(max(peak, peak_bytes())),
        "bytes": memory(engine),
        "trainable": trainable,
        "skipped_steps": engine.skipped_steps,
    }
