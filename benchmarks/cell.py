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
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from deepspeed.accelerator import get_accelerator

import grass_ds
from benchmarks.methods import METHODS, ds_config, prepare_model
from grass_ds.config import SCORED_SAMPLERS
from launch import distributed
from launch.data import Collator, load_splits, tokenize
from launch.evaluate import exact_match, mean_loss
from launch.model import load
from launch.template import Template

PACKAGES = ("torch", "deepspeed", "transformers", "peft")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("cost", "quality"))
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
    return parser.parse_args()


def main() -> None:
    args = parse()
    distributed.start()
    torch.manual_seed(args.seed)
    model, tokenizer = load(args.model)
    measure = cost if args.kind == "cost" else quality
    row = {**conditions(args), **measure(args, model, tokenizer)}
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
    )
    accelerator = get_accelerator()
    block = METHODS[args.method]
    drawn = block is not None and block["sampler"] in SCORED_SAMPLERS
    return {
        **{key: getattr(args, key) for key in keys},
        **({"data": args.data} if args.kind == "quality" else {}),
        "temperature": grass_ds.GrassConfig(**{**block, **args.grass}).temperature if drawn else None,
        "ranks": distributed.world_size(),
        "device": accelerator.device_name(),
        "hardware": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def build(args: argparse.Namespace, model: Any) -> Any:
    """The engine of the method."""
    grass = {"seed": args.seed, **args.grass}
    config = ds_config(
        args.method,
        stage=args.stage,
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        lr=args.lr,
        grass=grass,
    )
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
        get_accelerator().synchronize()
        times[part] = time.perf_counter() - begin
    return {**times, "loss": loss.item()}


def cost(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds per step (probing apart), peak memory, bytes by category, gradient traffic."""
    args.grass = {"probe_steps": 2, "sample_period": max(2, args.steps // 2), **args.grass}
    engine = build(args, model)
    generator = torch.Generator().manual_seed(1000 * args.seed + distributed.rank())

    def micro_batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 1000, (args.micro_batch, args.sequence), generator=generator).to(engine.device)
        return {"input_ids": ids, "labels": ids}

    grass = engine.grass
    probing = []
    while grass is not None and grass.phase == "probe":
        probing.append(_one_step(engine, micro_batch, args.accumulation))
    for _ in range(args.warmup):
        _one_step(engine, micro_batch, args.accumulation)
    measured, active = [], []
    for _ in range(args.steps):
        active.append(list(grass.active_layers) if grass is not None else None)
        measured.append(_one_step(engine, micro_batch, args.accumulation))
    totals = [sum(parts.values()) for parts in measured]
    return {
        "seconds": totals,
        "median_seconds": statistics.median(totals),
        **{f"median_{part}": statistics.median(m[part] for m in measured) for part in ("forward", "backward", "step")},
        "probe_seconds": [sum(parts.values()) for parts in probing],
        "active": active,
        "peak_bytes": distributed.max_over_ranks(peak_bytes()),
        "bytes": grass.memory(peak=True) if grass is not None else None,
        "trainable": sum(p.numel() for p in engine.module.parameters() if p.requires_grad),
    }


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
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


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
