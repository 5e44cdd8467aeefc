# SPDX-License-Identifier: Apache-2.0
"""Measure one cell of the benchmarks: one method, one setting, one seed. ``run.py`` starts it on every rank.

torchrun --nproc_per_node 2 benchmarks/cell.py cost --method grass --dtype bf16 --out row.json
torchrun --nproc_per_node 1 benchmarks/cell.py quality --method grass --dtype bf16 --task builtin --out row.json
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from benchmarks.cost import cost
from benchmarks.engines import grass_config, prepare
from benchmarks.meters import process_bytes
from benchmarks.methods import METHODS, PACKAGES
from benchmarks.models import load
from benchmarks.places import OFFLOADS
from benchmarks.plain import plain
from benchmarks.quality import quality
from benchmarks.saves import measure_save
from benchmarks.shape import shape_of
from benchmarks.tasks import ROWS, TASKS
from grass_ds.precision import DTYPES
from launch import distributed

VERSIONS = ("torch", "deepspeed", "transformers", "peft")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cost", "quality", "checkpoint"))
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True, help="precision of weights, gradients, activations")
    parser.add_argument("--out", required=True, type=Path, help="JSON file for the row")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128, help="tokens per row (cost, checkpoint)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps (cost), all steps (quality)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones (cost)")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", choices=TASKS, help="what to train on (quality)")
    parser.add_argument("--data", help="folder of the tasks' sources; not in the row")
    parser.add_argument("--test-rows", type=int, default=ROWS, help="rows per measure (quality)")
    parser.add_argument(
        "--tuning", action="store_true", help="measure nothing but the loss on development rows (quality)"
    )
    parser.add_argument("--curve", type=int, default=0, help="measure that loss every so many steps, too (quality)")
    parser.add_argument(
        "--reprobe", type=int, default=0, help="measure all layers' scores every so many steps, too (quality)"
    )
    parser.add_argument(
        "--worth", type=int, default=0, help="first train each layer alone for so many steps, on a copy (quality)"
    )
    parser.add_argument("--grass", type=json.loads, default={}, help="JSON merged into the grass block")
    parser.add_argument("--offload", choices=OFFLOADS, help="where optimizer state lives; default: the method's way")
    parser.add_argument("--nvme-path", help="existing folder on a local disk, for the nvme variants; not in the row")
    parser.add_argument("--prepare-state", action="store_true", help="make the state of all layers first (cost)")
    parser.add_argument("--async", action="store_true", help="write checkpoints in the background (checkpoint)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--plain", action="store_true", help="then time the same passes in plain PyTorch, the floor of time (cost)"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    distributed.start()
    torch.manual_seed(args.seed)
    baseline = process_bytes("VmRSS")
    model, tokenizer = fresh(args)
    measure = {"cost": cost, "quality": quality, "checkpoint": checkpoint}[args.kind]
    row = conditions(args)
    try:
        row.update(measure(args, model, tokenizer))
    except torch.OutOfMemoryError:
        if distributed.world_size() > 1:  # the other ranks wait for this one
            raise
        row["skipped"] = f"out of memory on a device of {get_accelerator().total_memory() / 1e9:.0f} GB"
    row["baseline_bytes"] = int(distributed.max_over_ranks(baseline))
    row["shape"] = shape_of(model)
    if args.plain and "skipped" not in row:
        row["plain"] = plain(row, fresh(args)[0])
    if distributed.rank() == 0:
        args.out.write_text(json.dumps(row) + "\n")
    distributed.stop()


def fresh(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model as it is loaded, in training mode, and its tokenizer."""
    model, tokenizer = distributed.on_every_rank(lambda: load(args.model, args.dtype))
    model.train()
    if args.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    keys = (
        "kind",
        "dtype",
        "method",
        "model",
        "stage",
        "micro_batch",
        "accumulation",
        "sequence",
        "steps",
        "lr",
        "seed",
        "grass",
        "offload",
        "checkpointing",
        "prepare_state",
        "async",
    )
    accelerator = get_accelerator()
    block = grass_config(args)
    packages = (*VERSIONS, *([PACKAGES[args.method]] if args.method in PACKAGES else []))
    return {
        **{key: getattr(args, key) for key in keys},
        **({"task": args.task} if args.kind == "quality" else {}),
        "temperature": block.temperature if block is not None and block.probes else None,
        "ranks": distributed.world_size(),
        "device": accelerator.device_name(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def hardware() -> str:
    """What the accelerator is called; for the CPU its model, cores (also how many this process may use) and memory of the machine."""
    module = torch.get_device_module(get_accelerator().device_name())
    if hasattr(module, "get_device_name"):
        return module.get_device_name()
    found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    name = found.group(1) if found else platform.machine()
    cores, usable = psutil.cpu_count(), len(os.sched_getaffinity(0))
    some = "" if usable == cores else f"{usable} of "
    return f"{name}, {some}{cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def checkpoint(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Bytes of a checkpoint, and seconds that it takes; after probing."""
    engine, one_step = prepare(args, model)
    while engine.grass is not None and engine.grass.phase == "probe":
        one_step()
    return measure_save(engine, lambda: sum(one_step().values()), args.steps, args.nvme_path)


if __name__ == "__main__":
    main()
