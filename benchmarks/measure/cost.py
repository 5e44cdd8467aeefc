# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, on random tokens (cases of kind ``cost``)."""

from dataclasses import replace
from typing import Any

from benchmarks.baselines import active_layers
from benchmarks.case import Case
from benchmarks.measure.engine import PARTS, build, random_steps, trainable_numel
from benchmarks.measure.observer import disk_bytes, memory, observe, peak_bytes, reset_peak, resident_bytes
from launch import distributed


def cost(case: Case, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds of every measured step, memory, bytes through the disk, and one more step observed.

    Probing steps are timed apart. ``skipped_steps``: measured steps that fp16's loss scale skipped.
    """
    case = replace(case, grass={"probe_steps": 2, "sample_period": max(2, case.steps // 2), **case.grass})
    engine, toggle = build(case, model)
    step = random_steps(case, engine)
    probing = []
    while engine.grass is not None and engine.grass.phase == "probe":
        probing.append(sum(step().values()))
    for _ in range(case.warmup):
        step()
    peak, skipped, disk = peak_bytes(), engine.skipped_steps, disk_bytes()
    reset_peak()
    measured, active = [], []
    for _ in range(case.steps):
        active.append(active_layers(engine, toggle))
        measured.append(step())
    moved = {direction: nbytes - disk[direction] for direction, nbytes in disk_bytes().items()}
    train_peak = distributed.max_over_ranks(peak_bytes())
    return {
        "seconds": [sum(times.values()) for times in measured],
        **{f"{part}_seconds": [times[part] for times in measured] for part in PARTS},
        "probe_seconds": probing,
        "active": active,
        "skipped_steps": engine.skipped_steps - skipped,
        "peak_bytes": max(distributed.max_over_ranks(peak), train_peak),
        "train_peak_bytes": train_peak,
        "resident_bytes": distributed.max_over_ranks(resident_bytes()),
        "disk_bytes": {direction: distributed.max_over_ranks(nbytes) for direction, nbytes in moved.items()},
        "bytes": memory(engine),
        "trainable": trainable_numel(engine),
        "observed": observe(engine, case, active_layers(engine, toggle)),
    }
