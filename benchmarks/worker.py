# SPDX-License-Identifier: Apache-2.0
"""Measure one case. ``run.py`` starts this program on every rank; rank 0 writes the row.

torchrun --nproc_per_node 2 benchmarks/worker.py '{"kind": "cost", "method": "grass", "dtype": "bf16"}' row.json
"""

import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.case import Case, Row
from benchmarks.checkpoint.saving import checkpoint
from benchmarks.epoch.training import epoch
from benchmarks.levers.scores import scores
from benchmarks.measure.cost import cost
from benchmarks.measure.observer import resident_bytes
from benchmarks.measure.plain import plain
from benchmarks.methods import METHODS, grass_config
from benchmarks.models import load, shape_of
from benchmarks.quality.training import quality
from grass_ds.sampling.registry import find_sampler
from launch import distributed

# kind -> measurement of a case, its model and its tokenizer: fields of the row.
MEASUREMENTS: dict[str, Callable[[Case, Any, Any], Row]] = {
    "cost": cost,
    "quality": quality,
    "epoch": epoch,
    "checkpoint": checkpoint,
    "scores": scores,
}
# Fields of the case that its row repeats under the same names.
CONDITIONS = (
    *("kind", "dtype", "method", "model", "stage", "micro_batch", "accumulation", "sequence", "steps"),
    *("lr", "seed", "grass", "offload", "checkpointing", "prepare_state"),
)


def main() -> None:
    case, out = Case.parse(sys.argv[1]), Path(sys.argv[2])
    distributed.start()
    torch.manual_seed(case.seed)
    baseline = resident_bytes()
    model, tokenizer = fresh(case)
    row = conditions(case)
    try:
        row |= MEASUREMENTS[case.kind](case, model, tokenizer)
    except torch.OutOfMemoryError:
        if distributed.world_size() > 1:  # the other ranks wait for this one
            raise
        row["skipped"] = f"out of memory on a device of {get_accelerator().total_memory() / 1e9:.0f} GB"
    row["baseline_bytes"] = int(distributed.max_over_ranks(baseline))
    row["shape"] = shape_of(model)
    if case.plain and "skipped" not in row:
        row["plain"] = plain(row, fresh(case)[0])
    if distributed.rank() == 0:
        out.write_text(json.dumps(row) + "\n")
    distributed.stop()


def fresh(case: Case) -> tuple[Any, Any]:
    """The model as it is loaded, in training mode, and its tokenizer."""
    model, tokenizer = distributed.on_every_rank(lambda: load(case.model, case.dtype))
    model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def conditions(case: Case) -> Row:
    """What the row says of its case, the machine and the packages."""
    config, package = grass_config(case), METHODS[case.method].package
    packages = ("torch", "deepspeed", "transformers", "peft", *filter(None, [package]))
    return {
        **{name: getattr(case, name) for name in CONDITIONS},
        "async": case.async_save,
        **({"task": case.task} if case.task is not None else {}),
        "temperature": config.temperature
        if config is not None and find_sampler(config.sampler).needs_scores
        else None,
        "ranks": distributed.world_size(),
        "device": get_accelerator().device_name(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "glibc": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def hardware() -> str:
    """Name of the accelerator; of a CPU its model, the cores that this process may use, and memory."""
    module = torch.get_device_module(get_accelerator().device_name())
    if hasattr(module, "get_device_name"):
        return module.get_device_name()
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = found.group(1) if found else platform.machine()
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


if __name__ == "__main__":
    main()
