# SPDX-License-Identifier: Apache-2.0
"""Runs whose memory and traffic are planned, and measured on two ranks: one cell per combination of settings."""

import copy
import itertools
from functools import cache
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "wide": {
        **{"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8},
        **{"num_key_value_heads": 8, "vocab_size": 256},
    },
    "deep": {
        **{"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 8, "num_attention_heads": 6},
        **{"num_key_value_heads": 2, "vocab_size": 4096},
    },
}
ROWS, TOKENS, RANKS = 4, 192, 2
# ZeRO-3 as a large model has it: nothing stays for its own sake, norms apart, and one block is gathered ahead.
RELEASING = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 1000,
}
KEEPING = {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 1000}


def cell(
    stage: int,
    state_format: str,
    device: str,
    gamma: int,
    checkpointing: bool,
    shape: str,
    *,
    accumulation: int = 1,
    sampler: str = "uniform",
    zero: dict[str, Any] | None = None,
    tokens: int = TOKENS,
    **grass: Any,
) -> dict[str, Any]:
    """A DeepSpeed config without the path of state files, and the rest of a run."""
    offload = {
        "device": device,
        "state_format": state_format,
        "chunk_numel": 200_000,
        "io": "posix",
        **grass.pop("offload", {}),
    }
    block = {"sampler": sampler, "num_active_layers": gamma, "sample_period": 100, "probe_steps": 100, "seed": 5}
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, **((zero or RELEASING) if stage == 3 else {})},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "steps_per_print": 10**9,
        "grass": {**block, **grass, "offload": offload},
    }
    return {"config": config, "shape": shape, "checkpointing": checkpointing, "tokens": tokens}


def cells() -> dict[str, dict[str, Any]]:
    """Every stage with every format, each with another of the other settings; then what has a path of its own."""
    found = {}
    devices, gammas = itertools.cycle(("cpu", "nvme", "none", "cpu")), itertools.cycle((1, 2, 3))
    for shape, stage, state_format in itertools.product(SHAPES, (1, 2, 3), ("fp32", "exact", "bf16", "8bit")):
        device, gamma = next(devices), next(gammas)
        checkpointing = len(found) % 2 == (shape == "deep")
        name = f"{shape}, ZeRO-{stage}, {state_format}, {device}, gamma {gamma}{', checkpointing' * checkpointing}"
        found[name] = cell(stage, state_format, device, gamma, checkpointing, shape)
        if state_format == "8bit":
            next(devices)  # or every format would have one device
    lisa = {"always_active": ["embed", "norm", "head"]}
    for stage in (2, 3):
        found[f"wide, ZeRO-{stage}, probing"] = cell(stage, "fp32", "cpu", 1, False, "wide", sampler="grass")
        found[f"deep, ZeRO-{stage}, embeddings and head"] = cell(stage, "8bit", "cpu", 2, True, "deep", **lisa)
        found[f"wide, ZeRO-{stage}, full"] = cell(stage, "exact", "cpu", 4, stage == 3, "wide", sampler="full")
        # The fourth step, which is measured, ends a period: the next layers' state is there already.
        period = {"offload": {"residency": "period"}, "sample_period": 4}
        found[f"deep, ZeRO-{stage}, period"] = cell(stage, "bf16", "cpu", 2, False, "deep", **period)
        found[f"wide, ZeRO-{stage}, 2 tokens"] = cell(stage, "bf16", "cpu", 3, False, "wide", tokens=2)
    for stage in (1, 2):
        name = f"wide, ZeRO-{stage}, 2 micro-batches"
        found[name] = cell(stage, "fp32", "cpu", 2, True, "wide", accumulation=2)
    for stage in (1, 2, 3):
        found[f"wide, ZeRO-{stage}, expansion"] = cell(stage, "fp32", "cpu", 1, False, "wide", expansion=0.2)
        more = {"expansion": 0.2, "expansion_depth": 0, "accumulation": 2}
        found[f"deep, ZeRO-{stage}, expansion from layer 0"] = cell(stage, "8bit", "cpu", 2, True, "deep", **more)
    found["deep, ZeRO-3, gathered weights stay"] = cell(3, "exact", "cpu", 2, False, "deep", zero=KEEPING)
    return found


CELLS = cells()


def llama_config(shape: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**SHAPES[shape], use_cache=False, tie_word_embeddings=False, max_position_embeddings=TOKENS)


@cache
def model_of(shape: str) -> Any:
    import torch

    from grass_ds.plan.model_shape import ModelShape

    return ModelShape(llama_config(shape), torch.bfloat16)


def predicted(name: str, active: list[int]) -> dict[str, int]:
    """The same categories as :func:`measure_cells`, planned; ``active``: the layers that trained there."""
    from grass_ds.plan.predict import predict
    from grass_ds.plan.run_shape import run_shape

    planned = CELLS[name]
    config = copy.deepcopy(planned["config"])
    if config["grass"]["offload"]["device"] == "nvme":
        config["grass"]["offload"]["nvme_path"] = "/"
    run = run_shape(config, RANKS, planned["tokens"], planned["checkpointing"])
    # While probing all layers are active, and none trains: more than a plan's step moves.
    found = predict(model_of(planned["shape"]), run, None if run.grass.sampler == "grass" else active)
    return {
        "weights": found.weights,
        "gradients": found.gradients,
        "state": found.state + found.window,
        "host": found.host,
        "disk": found.disk,
        "activations": found.saved,
        "peak": found.total,
        "traffic": sum(found.traffic.values()),
    }


PROBING = [name for name in CELLS if "probing" in name]


def deviation(expected: int, measured: int) -> float:
    """Of the prediction, relative; 0 if both are 0."""
    return (expected - measured) / max(measured, 1)


def measure_cells(names: list[str], folder: str) -> list[dict[str, Any]]:
    """Run inside a rank: bytes of each cell, by category."""
    return [_measure(CELLS[name], folder) for name in names]


def _measure(planned: dict[str, Any], folder: str) -> dict[str, Any]:
    import gc
    from unittest import mock

    import torch
    from transformers import LlamaForCausalLM

    from helpers.live import LiveBytes
    from helpers.models import engine_of
    from helpers.traffic import Collectives

    config = copy.deepcopy(planned["config"])
    if config["grass"]["offload"]["device"] == "nvme":
        config["grass"]["offload"]["nvme_path"] = folder
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(planned["shape"])).bfloat16().train()
    if planned["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(0, 256, (ROWS, planned["tokens"]))
    # ZeRO-3 replaces it for the rest of the process.
    plain_linear = mock.patch.object(torch.nn.functional, "linear", torch._C._nn.linear)
    with plain_linear, LiveBytes(model.parameters()) as live, engine_of(config, model) as engine:
        for unit in engine.optimizer.units:
            if unit.ever_active:
                engine.optimizer.store.ensure(unit)

        def step() -> int:
            saved = 0
            for _ in range(config["gradient_accumulation_steps"]):
                before, gathered = live.now, engine.grass.memory()["weights"]["device"]
                loss = engine(input_ids=ids, labels=ids).loss
                gathered = engine.grass.memory()["weights"]["device"] - gathered
                saved = live.now - before - gathered
                engine.backward(loss)
                engine.step()
            return saved

        for _ in range(3):  # ZeRO-3 records a trace, and then uses it
            step()
        gc.collect()
        rest = live.peak = live.now
        resting = engine.grass.memory()
        active = list(engine.grass.active_layers)
        with Collectives() as sent:
            found = step()
        memory = engine.grass.memory(peak=True)
        state = memory["optimizer_state"]
        return {
            "active": active,
            "weights": resting["weights"]["device"],
            "gradients": memory["gradients"]["device"],
            "state": state["device"],
            "host": state["host"],
            "disk": state.get("nvme", 0),
            "activations": found,
            "peak": live.peak - rest + resting["weights"]["device"] + resting["optimizer_state"]["device"],
            "traffic": sum(nbytes for _, nbytes in sent.calls),
        }
