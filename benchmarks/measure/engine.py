# SPDX-License-Identifier: Apache-2.0
"""The engine of a case, and its timed steps."""

import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

import grass_ds
from benchmarks.baselines import LayerToggle, SignSGD, badam_engine
from benchmarks.case import Case
from benchmarks.methods import LAYERS, METHODS, ds_config, grass_config, prepare_model
from grass_ds.sampling.controller import Controller
from launch import distributed

PARTS = ("forward", "backward", "step")
Step = Callable[[], dict[str, float]]


def training_steps(case: Case, num_layers: int) -> int:
    """Steps of the case that update weights: the learning-rate schedule waits while ``grass`` probes."""
    config = grass_config(case)
    if config is None:
        return case.steps
    return case.steps - Controller(num_layers, **config.controller_arguments()).probe_steps_within(case.steps)


def trainable_numel(engine: Any) -> int:
    """Elements that train now; a sharded weight counts whole."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad)


def build(case: Case, model: Any) -> tuple[Any, LayerToggle | None]:
    """The engine of the method, and what toggles its layers if the method does."""
    layers = model.get_decoder().layers
    largest = max(sum(weight.numel() for weight in layer.parameters()) for layer in layers)
    total_steps = training_steps(case, len(layers)) if case.task is not None else None
    config = ds_config(case, bucket=max(5_000_000, largest), total_steps=total_steps)
    if case.method == "badam-package":
        return badam_engine(model, config, switch_every=case.grass.get("sample_period", 50)), None
    model = prepare_model(case.method, model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = None
    if METHODS[case.method].sign_sgd:
        del config["optimizer"]
        optimizer = SignSGD(trainable, case.lr)
        config["zero_allow_untested_optimizer"] = True
    engine = grass_ds.initialize(model=model, optimizer=optimizer, model_parameters=trainable, config=config)[0]
    if not METHODS[case.method].toggles:
        return engine, None
    count, period = case.grass.get("num_active_layers", LAYERS), case.grass.get("sample_period", 20)
    return engine, LayerToggle(engine, count, period, case.seed)


def micro_step(engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Seconds of the parts of one micro-step, and its loss."""
    times = {}
    begin = time.perf_counter()

    def finish(part: str) -> None:
        nonlocal begin
        finish_compute()
        now = time.perf_counter()
        times[part], begin = now - begin, now

    loss = engine(**batch).loss
    finish("forward")
    engine.backward(loss)
    finish("backward")
    engine.step()
    finish("step")
    return {**times, "loss": loss.item()}


def finish_compute() -> None:
    """Wait for the compute stream, but not for transfers on other streams: those may overlap with the next step."""
    stream = get_accelerator().current_stream()
    if stream is not None:
        stream.synchronize()


def random_steps(case: Case, engine: Any) -> Step:
    """An optimizer step on random tokens, which do not change its cost; seconds of its parts on the slowest rank."""
    if case.prepare_state:
        prepare_state(engine)
    generator = torch.Generator().manual_seed(1000 * case.seed + distributed.rank())

    def step() -> dict[str, float]:
        total = dict.fromkeys(PARTS, 0.0)
        for _ in range(case.accumulation):
            ids = torch.randint(0, 1000, (case.micro_batch, case.sequence), generator=generator).to(engine.device)
            times = micro_step(engine, {"input_ids": ids, "labels": ids})
            total = {part: seconds + times[part] for part, seconds in total.items()}
        return {part: distributed.max_over_ranks(seconds) for part, seconds in total.items()}

    return step


def prepare_state(engine: Any) -> None:
    """Allocate the optimizer state of all that can train, as after a long run: a draw then moves state."""
    for unit in engine.optimizer.units:
        if unit.ever_active:
            engine.optimizer.store.ensure(unit)
