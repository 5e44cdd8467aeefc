# SPDX-License-Identifier: Apache-2.0
"""Measure one cell of the benchmarks: one method, one setting, one seed. ``run.py`` starts it on every rank.

torchrun --nproc_per_node 2 benchmarks/cell.py cost --method grass --out row.json
torchrun --nproc_per_node 1 benchmarks/cell.py quality --method grass --data builtin:arithmetic --out row.json
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from deepspeed.accelerator import get_accelerator

import grass_ds
from benchmarks.methods import METHODS, PACKAGES, ds_config, prepare_model
from benchmarks.models import largest_layer, load
from benchmarks.peers import BlockWatch, badam_engine
from benchmarks.places import OFFLOADS
from benchmarks.saves import measure_save
from grass_ds.config import SCORED_SAMPLERS
from launch import distributed
from launch.data import Collator, load_splits, tokenize
from launch.evaluate import exact_match, mean_loss
from launch.template import Template

VERSIONS = ("torch", "deepspeed", "transformers", "peft")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cost", "quality", "checkpoint"))
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--out", required=True, type=Path, help="JSON file for the row")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sequence", type=int, default=128, help="tokens per row (cost), longest row (quality)")
    parser.add_argument("--steps", type=int, default=8, help="measured steps (cost), all steps (quality)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones (cost)")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="builtin:arithmetic")
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--accuracy", action="store_true", help="also measure exact match (quality)")
    parser.add_argument("--grass", type=json.loads, default={}, help="JSON merged into the grass block")
    parser.add_argument("--offload", choices=OFFLOADS, help="where optimizer state lives; default: the method's way")
    parser.add_argument("--nvme-path", help="existing folder on a local disk, for the nvme variants; not in the row")
    parser.add_argument("--prepare-state", action="store_true", help="make the state of all layers first (cost)")
    parser.add_argument("--async", action="store_true", help="write checkpoints in the background (checkpoint)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    return parser.parse_args()


def main() -> None:
    args = parse()
    distributed.start()
    torch.manual_seed(args.seed)
    model, tokenizer = distributed.on_every_rank(lambda: load(args.model))
    if args.checkpointing:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    measure = {"cost": cost, "quality": quality, "checkpoint": checkpoint}[args.kind]
    row = conditions(args)
    try:
        row.update(measure(args, model, tokenizer))
    except torch.OutOfMemoryError:
        if distributed.world_size() > 1:  # the other ranks wait for this one
            raise
        row["skipped"] = f"out of memory on a device of {get_accelerator().total_memory() / 1e9:.0f} GB"
    if distributed.rank() == 0:
        args.out.write_text(json.dumps(row) + "\n")
    distributed.stop()


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    keys = (
        "kind",
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
    block = METHODS[args.method]
    drawn = block is not None and block["sampler"] in SCORED_SAMPLERS
    packages = (*VERSIONS, *([PACKAGES[args.method]] if args.method in PACKAGES else []))
    return {
        **{key: getattr(args, key) for key in keys},
        **({"data": args.data} if args.kind == "quality" else {}),
        "temperature": grass_ds.GrassConfig(**{**block, **grass_settings(args)}).temperature if drawn else None,
        "ranks": distributed.world_size(),
        "device": accelerator.device_name(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def hardware() -> str:
    """What the accelerator is called; for the CPU its kind."""
    module = torch.get_device_module(get_accelerator().device_name())
    if hasattr(module, "get_device_name"):
        return module.get_device_name()
    return platform.processor() or platform.machine()


def grass_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of the grass block."""
    settings = {"seed": args.seed, **args.grass}
    if args.offload is not None:
        path = {"nvme_path": args.nvme_path} if OFFLOADS[args.offload]["device"] == "nvme" else {}
        settings["offload"] = {**OFFLOADS[args.offload], **path}
    return settings


def build(args: argparse.Namespace, model: Any) -> Any:
    """The engine of the method."""
    config = ds_config(
        args.method,
        stage=args.stage,
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        lr=args.lr,
        grass=grass_settings(args),
        bucket=max(5_000_000, largest_layer(model)),
        fused=get_accelerator().device_name() != "cpu",
    )
    if getattr(args, "async"):
        config["checkpoint"] = {"async": True}
    if args.method == "badam-package":
        return badam_engine(model, config, switch_every=args.grass.get("sample_period", 50))
    model = prepare_model(args.method, model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return grass_ds.initialize(model=model, model_parameters=trainable, config=config)[0]


def step(engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """One micro-step; seconds of its parts."""
    times, loss = {}, None
    for part in ("forward", "backward", "step"):
        begin = time.perf_counter()
        if part == "forward":
            loss = engine(**batch).loss
        elif part == "backward":
            engine.backward(loss)
        else:
            engine.step()
        finish_compute()
        times[part] = time.perf_counter() - begin
    return {**times, "loss": loss.item()}


def finish_compute() -> None:
    """Wait for what was computed, but not for transfers on other streams: those may go on under the next step."""
    stream = get_accelerator().current_stream()
    if stream is not None:
        stream.synchronize()


def cost(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds per step (probing apart), memory of the process, bytes by category, bytes through the disk."""
    args.grass = {"probe_steps": 2, "sample_period": max(2, args.steps // 2), **args.grass}
    engine, one_step = prepare(args, model)
    grass = engine.grass
    probing = []
    while grass is not None and grass.phase == "probe":
        probing.append(one_step())
    for _ in range(args.warmup):
        one_step()
    measured, active, changed, first_steps, disk = [], [], [], 0, disk_bytes()
    for _ in range(args.steps):
        watch = BlockWatch(engine) if args.method in PACKAGES else None
        active.append(list(grass.active_layers) if grass is not None else watch.layers if watch is not None else None)
        first_steps += count_first_steps(engine) if grass is not None else 0
        measured.append(one_step())
        changed.append(bool(distributed.max_over_ranks(watch.changed())) if watch is not None else None)
    moved = {direction: nbytes - disk[direction] for direction, nbytes in disk_bytes().items()}
    totals = [sum(parts.values()) for parts in measured]
    return {
        "seconds": totals,
        "step_seconds": [parts["step"] for parts in measured],
        "median_seconds": statistics.median(totals),
        **{f"median_{part}": statistics.median(m[part] for m in measured) for part in ("forward", "backward", "step")},
        "probe_seconds": [sum(parts.values()) for parts in probing],
        "active": active,
        "changed": changed,
        "first_steps": first_steps,
        "peak_bytes": distributed.max_over_ranks(peak_bytes()),
        "resident_bytes": distributed.max_over_ranks(process_bytes("VmRSS")),
        "disk_bytes": {direction: distributed.max_over_ranks(nbytes) for direction, nbytes in moved.items()},
        "bytes": grass.memory(peak=True) if grass is not None else None,
        "trainable": sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad),
    }


def checkpoint(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Bytes of a checkpoint, and seconds that it takes; after probing."""
    engine, one_step = prepare(args, model)
    while engine.grass is not None and engine.grass.phase == "probe":
        one_step()
    return measure_save(engine, lambda: sum(one_step().values()), args.steps, args.nvme_path)


def prepare(args: argparse.Namespace, model: Any) -> tuple[Any, Callable[[], dict[str, float]]]:
    """The engine, and a step of it: seconds of its parts. On random tokens, which do not change what a step costs."""
    engine = build(args, model)
    if args.prepare_state:
        prepare_state(engine)
    generator = torch.Generator().manual_seed(1000 * args.seed + distributed.rank())

    def micro_batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 1000, (args.micro_batch, args.sequence), generator=generator).to(engine.device)
        return {"input_ids": ids, "labels": ids}

    return engine, lambda: _one_step(engine, micro_batch, args.accumulation)


def prepare_state(engine: Any) -> None:
    """Make the state of everything that can train, as it is after a long run: a layer that is drawn then moves its state."""
    for unit in engine.optimizer.units:
        if unit.ever_active:
            engine.optimizer.store.ensure(unit)


def count_first_steps(engine: Any) -> int:
    """Units whose state the coming step makes rather than moves."""
    return sum(unit.active and unit not in engine.optimizer.store for unit in engine.optimizer.units)


def _one_step(engine: Any, micro_batch: Any, accumulation: int) -> dict[str, float]:
    """Seconds of one optimizer step, the slowest rank counting."""
    total = dict.fromkeys(("forward", "backward", "step"), 0.0)
    for _ in range(accumulation):
        times = step(engine, micro_batch())
        for part in total:
            total[part] += times[part]
    return {part: distributed.max_over_ranks(seconds) for part, seconds in total.items()}


def peak_bytes() -> int:
    """Largest memory so far: the device's allocator on a GPU, resident memory of the process on the CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return accelerator.max_memory_allocated()
    return process_bytes("VmHWM")


def process_bytes(field: str) -> int:
    """Resident memory of this process: ``VmRSS`` now, ``VmHWM`` at its largest."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def disk_bytes() -> dict[str, int]:
    """Bytes that this process, all threads, has read from and written to disks so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(counters["read_bytes"]), "written": int(counters["write_bytes"])}


def quality(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Loss on held-out answers, and accuracy if asked, before and after ``steps`` steps."""
    template = Template.choose(tokenizer)
    splits = load_splits(args.data)
    train = tokenize(splits["train"], template, args.sequence, "drop")
    test = splits["test"].take(args.test_rows)
    test_tokens = list(tokenize(test, template, args.sequence, "drop"))

    def score() -> dict[str, float]:
        result = {"loss": mean_loss(model, template, test_tokens, batch_size=8)}
        if args.accuracy:
            result["accuracy"] = exact_match(model, template, test, batch_size=50, max_new_tokens=40)
        return result

    before = score() if args.steps == 0 else None  # the same for every method and seed: one cell of its own
    engine = build(args, model)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    collate = Collator(tokenizer.pad_token_id)
    world, size, losses = distributed.world_size(), args.micro_batch, []
    begin = time.perf_counter()
    for micro in range(args.steps * args.accumulation):
        first = (micro * world + distributed.rank()) * size
        rows = [train[order[(first + i) % len(order)]] for i in range(size)]
        losses.append(step(engine, {k: v.to(engine.device) for k, v in collate(rows).items()})["loss"])
    seconds = time.perf_counter() - begin
    return {
        "after": before or score(),
        "train_losses": losses,
        "seconds": seconds,
        "visits": list(engine.grass.visits) if engine.grass is not None else None,
        "scores": list(engine.grass.scores) if engine.grass is not None and engine.grass.scores else None,
        "test_rows": len(test_tokens),
    }


if __name__ == "__main__":
    main()
