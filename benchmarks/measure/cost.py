# SPDX-License-Identifier: Apache-2.0
"""What a training step costs, on random tokens (cases of kind ``cost``)."""

import statistics
from dataclasses import replace
from typing import Any

from benchmarks.baselines import watch
from benchmarks.case import Case
from benchmarks.measure.engine import PARTS, build, count_first_steps, random_steps, trainable_numel
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
    watched = watch(case.method, engine, toggle)
    measured, active, facts, first_steps = [], [], [], 0
    for _ in range(case.steps):
        active.append(watched.before_step())
        first_steps += count_first_steps(engine)
        measured.append(step())
        facts.append(watched.after_step())
    moved = {direction: nbytes - disk[direction] for direction, nbytes in disk_bytes().items()}
    train_peak = distributed.max_over_ranks(peak_bytes())
    seconds = {part: [times[part] for times in measured] for part in PARTS}
    totals = [sum(times.values()) for times in measured]
    return {
        "seconds": totals,
        **{f"{part}_seconds": values for part, values in seconds.items()},
        "median_seconds": statistics.median(totals),
        **{f"median_{part}": statistics.median(values) for part, values in seconds.items()},
        "probe_seconds": probing,
        "active": active,
        **{name: [fact[name] for fact in facts] for name in ("changed", "moved_frozen")},
        "first_steps": first_steps,
        "skipped_steps": engine.skipped_steps - skipped,
        "peak_bytes": max(distributed.max_over_ranks(peak), train_peak),
        "train_peak_bytes": train_peak,
        "resident_bytes": distributed.max_over_ranks(resident_bytes()),
        "disk_bytes": {direction: distributed.max_over_ranks(nbytes) for direction, nbytes in moved.items()},
        "bytes": memory(engine),
        "trainable": trainable_numel(engine),
        "observed": observe(engine, case, watched.before_step()),
    }
