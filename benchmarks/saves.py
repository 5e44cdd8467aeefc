# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what one weighs and how long training stands still for it (suite ``checkpoint``)."""

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.places import each, header, line, precision_unlike_bf16
from launch import distributed

Row = dict[str, Any]
STOCK = "full fine-tuning (stock DeepSpeed)"
STEPS = 10  # before the checkpoint
MEASURES = ("checkpoint_bytes", "stall_seconds", "disk_seconds")
# label -> arguments of the cell. The state of all layers is made first where it says so: the largest checkpoint that the method writes.
SAVES: dict[str, Row] = {
    STOCK: {"method": "full"},
    f"**grass**, early: the layers drawn in {STEPS} steps have state": {"method": "grass"},
    "**grass**, late: every layer has state": {"method": "grass", "prepare-state": True},
    '**grass**, late, `"checkpoint": {"async": true}`': {"method": "grass", "prepare-state": True, "async": True},
}


def save_cells(rounds: int) -> Iterator[Row]:
    """Every way of saving, on ZeRO-2 and ZeRO-3."""
    for repetition in range(rounds):
        for stage in (2, 3):
            for way in SAVES.values():
                yield {
                    "kind": "checkpoint",
                    "stage": stage,
                    "seed": repetition,
                    "ranks": 2,
                    "micro-batch": 2,
                    "sequence": 128,
                    "grass": {"probe_steps": 2, "sample_period": 5},
                    "steps": STEPS,
                    **way,
                }


def measure_save(engine: Any, one_step: Callable[[], float], steps: int, disk: str) -> Row:
    """Train, save, and train on until all is on disk; seconds of the slowest rank.

    Stock DeepSpeed leaves its files to the operating system; ``sync`` puts them on the disk, as ours are when they are published.
    """
    before = [one_step() for _ in range(steps)]
    folder = _shared_folder(disk)
    stall = _timed(lambda: engine.save_checkpoint(folder, tag="saved"))
    if engine.grass is None:
        return {
            "step_seconds": before,
            "stall_seconds": stall,
            "disk_seconds": stall + _timed(os.sync),
            **_weigh(folder),
        }
    begin, during = time.perf_counter(), []
    while distributed.max_over_ranks(float(engine.grass.checkpoint.seconds is None)):
        during.append(one_step())
    engine.wait_for_checkpoint()
    disk_seconds = stall + (distributed.max_over_ranks(time.perf_counter() - begin) if during else 0.0)
    return {
        "step_seconds": before,
        "stall_seconds": stall,
        "disk_seconds": disk_seconds,
        "seconds_meanwhile": during,
        **_weigh(folder),
    }


def _shared_folder(disk: str) -> Path:
    """A new folder of this cell, the same for all ranks."""
    place = Path(disk, "checkpoint")
    if distributed.rank() == 0:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    distributed.max_over_ranks(0.0)
    return place


def _timed(action: Callable[[], Any]) -> float:
    distributed.max_over_ranks(0.0)  # start together
    begin = time.perf_counter()
    action()
    return distributed.max_over_ranks(time.perf_counter() - begin)


def _weigh(folder: Path) -> Row:
    files = [path for path in (folder / "saved").iterdir() if path.is_file()]
    return {
        "checkpoint_bytes": sum(path.stat().st_size for path in files),
        "optimizer_bytes": sum(path.stat().st_size for path in files if "optim_states" in path.name),
    }


def against_stock(rows: Iterable[Row], stage: int) -> dict[str, Row]:
    """Per way that was measured, beside stock in the same rounds: medians, and ``bytes_ratio`` and ``stall_ratios`` to stock's."""
    rows = list(rows)
    base = {row["seed"]: row for row in _of(rows, stage, SAVES[STOCK])}
    found = {}
    for label, way in SAVES.items():
        mine = [row for row in _of(rows, stage, way) if row["seed"] in base]
        if not mine:
            continue
        meanwhile = [seconds for row in mine for seconds in row.get("seconds_meanwhile", [])]
        found[label] = {
            **{name: statistics.median(row[name] for row in mine) for name in MEASURES},
            "step_seconds": statistics.median(seconds for row in mine for seconds in row["step_seconds"]),
            "seconds_meanwhile": statistics.median(meanwhile) if meanwhile else None,
            "bytes_ratio": statistics.median(
                row["checkpoint_bytes"] / base[row["seed"]]["checkpoint_bytes"] for row in mine
            ),
            "stall_ratios": [row["stall_seconds"] / base[row["seed"]]["stall_seconds"] for row in mine],
        }
    return found


def save_table(rows: list[Row]) -> list[str]:
    """One line per stage and way; ratios against stock within the same round, their median."""
    lines = header(
        "way",
        "ZeRO stage",
        "all files",
        "of stock",
        "training stood still",
        "of stock",
        "until on disk",
        "s / step before, meanwhile",
    )
    for stage in sorted({row["stage"] for row in rows}):
        for label, one in against_stock(rows, stage).items():
            steps = [one["step_seconds"], *([one["seconds_meanwhile"]] if one["seconds_meanwhile"] else [])]
            stalls = one["stall_ratios"]
            cells = [
                label,
                str(stage),
                f"{one['checkpoint_bytes'] / 1e6:.0f} MB",
                f"{one['bytes_ratio']:.2f}",
                f"{one['stall_seconds']:.2f} s",
                f"{statistics.median(stalls):.2f} ({min(stalls):.2f} to {max(stalls):.2f})",
                f"{one['disk_seconds']:.2f} s",
                ", ".join(f"{seconds:.2f}" for seconds in steps),
            ]
            lines.append(line(cells))
    return lines


def save_sentence(rows: list[Row]) -> str:
    """What README.md quotes, for ZeRO-2; empty where a way has not been measured."""
    found = against_stock(rows, 2)
    if set(found) != set(SAVES):
        return ""
    early, late, background = (found[label] for label in SAVES if label != STOCK)
    one = rows[0]
    return (
        f"Measured (SmolLM2-135M{precision_unlike_bf16(one)}, {one['ranks']} {one['device'].upper()} ranks, ZeRO-2, against stock full fine-tuning; commit "
        f"{each(rows, 'commit', ', ')}): {early['checkpoint_bytes'] / 1e6:.0f} MB after {STEPS} steps, "
        f"{early['bytes_ratio']:.2f} of stock's, and {late['checkpoint_bytes'] / 1e6:.0f} MB, {late['bytes_ratio']:.2f}, once every layer has "
        f"state. Training stands still for {statistics.median(late['stall_ratios']):.2f} of stock's time with the files on disk when it goes "
        f"on, and for {statistics.median(background['stall_ratios']):.2f} ({background['stall_seconds']:.2f} s) with `async`, when a step during "
        f"the {background['disk_seconds'] - background['stall_seconds']:.1f} s of writing takes "
        f"{background['seconds_meanwhile'] / background['step_seconds']:.2f} of its time before."
    )


def _of(rows: Iterable[Row], stage: int, way: Row) -> list[Row]:
    asked = {"prepare_state": False, "async": False, **{key.replace("-", "_"): value for key, value in way.items()}}
    return [row for row in rows if row["stage"] == stage and all(row[key] == value for key, value in asked.items())]


def save_note(rows: list[Row]) -> str:
    """How to read the table."""
    return (
        f"Medians over {len({row['seed'] for row in rows})} interleaved rounds. Bytes of all files in the checkpoint's folder, all ranks. Stock "
        "returns when the operating system has its files, ours when they are on the disk and published; the column after says when each is on "
        "the disk (`sync` for stock). The state of a layer that was never drawn takes no space in ours, its fp32 weights do."
    )
