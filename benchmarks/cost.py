# SPDX-License-Identifier: Apache-2.0
"""Cells of kind ``cost``: what steps cost, on random tokens."""

import argparse
import statistics
from typing import Any

from benchmarks.engines import count_first_steps, prepare, trainable_numel
from benchmarks.meters import disk_bytes, peak_bytes, process_bytes, reset_peak
from benchmarks.observed import memory, observe
from benchmarks.peers import watch
from launch import distributed


def cost(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds per step (probing apart), memory of the process, bytes by category, bytes through the disk.

    ``skipped_steps``: how many of the measured steps fp16's loss scale has skipped; their ``step()`` does nothing.
    """
    args.grass = {"probe_steps": 2, "sample_period": max(2, args.steps // 2), **args.grass}
    engine, one_step = prepare(args, model)
    grass = engine.grass
    probing = []
    while grass is not None and grass.phase == "probe":
        probing.append(one_step())
    for _ in range(args.warmup):
        one_step()
    peak, skipped = peak_bytes(), engine.skipped_steps
    reset_peak()
    watched = watch(args.method, engine)
    measured, active, facts, first_steps, disk = [], [], [], 0, disk_bytes()
    for _ in range(args.steps):
        active.append(watched.before_step())
        first_steps += count_first_steps(engine) if grass is not None else 0
        measured.append(one_step())
        facts.append(watched.after_step())
    moved = {direction: nbytes - disk[direction] for direction, nbytes in disk_bytes().items()}
    train_peak = distributed.max_over_ranks(peak_bytes())
    totals = [sum(parts.values()) for parts in measured]
    return {
        "seconds": totals,
        **{f"{part}_seconds": [parts[part] for parts in measured] for part in ("forward", "backward", "step")},
        "median_seconds": statistics.median(totals),
        **{f"median_{part}": statistics.median(m[part] for m in measured) for part in ("forward", "backward", "step")},
        "probe_seconds": [sum(parts.values()) for parts in probing],
        "active": active,
        **{name: [fact[name] for fact in facts] for name in ("changed", "moved_frozen")},
        "first_steps": first_steps,
        "skipped_steps": engine.skipped_steps - skipped,
        "peak_bytes": max(distributed.max_over_ranks(peak), train_peak),
        "train_peak_bytes": train_peak,
        "resident_bytes": distributed.max_over_ranks(process_bytes("VmRSS")),
        "disk_bytes": {direction: distributed.max_over_ranks(nbytes) for direction, nbytes in moved.items()},
        "bytes": memory(engine),
        "trainable": trainable_numel(engine),
        "observed": observe(engine, args, watched.before_step()),
    }
