# SPDX-License-Identifier: Apache-2.0
"""The engine of a cell, and one timed micro-step of it."""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import grass_ds
from benchmarks.methods import METHODS, ds_config, prepare_model
from benchmarks.models import largest_layer
from benchmarks.peers import badam_engine, toggle_layers
from benchmarks.places import OFFLOADS
from grass_ds.config import GrassConfig
from grass_ds.sampling.controller import Controller
from launch import distributed


def grass_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of the grass block."""
    settings = {"seed": args.seed, **args.grass}
    if args.offload is not None:
        path = {"nvme_path": args.nvme_path} if OFFLOADS[args.offload]["device"] == "nvme" else {}
        settings["offload"] = {**OFFLOADS[args.offload], **path}
    return settings


def grass_config(args: argparse.Namespace) -> GrassConfig | None:
    """The method's whole grass block; None for methods that are not ours."""
    block = METHODS[args.method].grass
    return None if block is None else GrassConfig(**{**block, **grass_settings(args)})


def updates(args: argparse.Namespace, num_layers: int) -> int:
    """Of the cell's steps those that update weights: while probing the schedule of the learning rate waits, too."""
    block = grass_config(args)
    if block is None:
        return args.steps
    return args.steps - Controller(num_layers, **block.controller_arguments()).probe_steps_within(args.steps)


def trainable_numel(engine: Any) -> int:
    """Elements that train now, sharded ones counted whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)


def build(args: argparse.Namespace, model: Any) -> Any:
    """The engine of the method."""
    config = ds_config(
        args.method,
        dtype=args.dtype,
        stage=args.stage,
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        lr=args.lr,
        grass=grass_settings(args),
        bucket=max(5_000_000, largest_layer(model)),
        total_steps=updates(args, len(model.get_decoder().layers)) if args.kind == "quality" else None,
    )
    if getattr(args, "async"):
        config["checkpoint"] = {"async": True}
    if args.method == "badam-package":
        return badam_engine(model, config, switch_every=args.grass.get("sample_period", 50))
    model = prepare_model(args.method, model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine = grass_ds.initialize(model=model, model_parameters=trainable, config=config)[0]
    if METHODS[args.method].toggles:  # 20 steps, 2 layers: the callbacks' defaults
        count, period = args.grass.get("num_active_layers", 2), args.grass.get("sample_period", 20)
        toggle_layers(engine, count, period, args.seed)
    return engine


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
