# SPDX-License-Identifier: Apache-2.0
"""Bytes of a checkpoint, and how long training stalls for it (cases of kind ``checkpoint``)."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.case import Case, Row
from benchmarks.measure.engine import build, random_steps
from launch import distributed


def checkpoint(case: Case, model: Any, tokenizer: Any) -> Row:
    """Train ``steps`` steps after probing, save into ``disk``, and train on until all is on disk."""
    engine, _ = build(case, model)
    one_step = random_steps(case, engine)

    def step() -> float:
        return sum(one_step().values())

    while engine.grass is not None and engine.grass.phase == "probe":
        step()
    before = [step() for _ in range(case.steps)]
    folder = _shared_folder(Path(str(case.disk), "checkpoint"))
    stall = _timed(lambda: engine.save_checkpoint(folder, tag="saved"))
    # Stock DeepSpeed leaves its files to the operating system; ``sync`` puts them on the disk, where ours are.
    written = _finish(engine, step) if engine.grass is not None else {"disk_seconds": _timed(os.sync)}
    written["disk_seconds"] += stall
    nbytes = sum(path.stat().st_size for path in (folder / "saved").iterdir())
    return {"step_seconds": before, "stall_seconds": stall, **written, "checkpoint_bytes": nbytes}


def _finish(engine: Any, step: Callable[[], float]) -> Row:
    """Train on until the files are on disk."""
    begin, during = time.perf_counter(), []
    while distributed.max_over_ranks(float(engine.grass.checkpoint.seconds is None)):
        during.append(step())
    engine.wait_for_checkpoint()
    writing = distributed.max_over_ranks(time.perf_counter() - begin) if during else 0.0
    return {"disk_seconds": writing, "seconds_meanwhile": during}


def _shared_folder(folder: Path) -> Path:
    """An empty folder, the same for all ranks."""
    if distributed.rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    distributed.barrier()
    return folder


def _timed(action: Callable[[], Any]) -> float:
    """Seconds of the slowest rank; all start together."""
    distributed.barrier()
    begin = time.perf_counter()
    action()
    return distributed.max_over_ranks(time.perf_counter() - begin)
