# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of a row's steps in plain PyTorch, on every rank at once: the least time that they can take.

The processes that measured the steps measure this right after them, so that both see the same speed of the machine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from benchmarks.case import Row
from benchmarks.cost_model import TrainedStep
from benchmarks.measure.engine import finish_compute
from benchmarks.methods import prepare_model
from grass_ds.precision import DTYPES
from launch import distributed

REPEATS = 3
ADAM_NUMEL = 4_000_000
MESSAGE_BYTES = 16 * 2**20
# DeepSpeed's ZeRO-3 replaces nn.functional.linear for the life of a process; within this it is torch's own.
TORCH_LINEAR = mock.patch.object(nn.functional, "linear", torch._C._nn.linear)


def plain(row: Row, model: nn.Module) -> dict[str, Any]:
    """Seconds of forward and backward per set of layers trained, and of AdamW; bytes per second of messages.

    Args:
        row: conditions of the steps, ``shape`` and ``active``.
        model: as it is loaded, before any engine; with gradient checkpointing if the row has it.
    """
    device = get_accelerator().current_device_name()
    model = prepare_model(row["method"], model.to(device)).train()
    dtype = DTYPES[row["dtype"]]
    model.to(dtype)  # PEFT makes float32 adapters, which an engine casts back
    ids = torch.randint(0, 1000, (row["micro_batch"], row["sequence"]), device=device)
    passes: list[dict[str, Any]] = []
    for active in row["active"]:
        if any(done["active"] == active for done in passes):
            continue
        step = TrainedStep(row, active)
        if not step.lora:
            freeze_all_but(model, step.layers, step.outside)
            if row["checkpointing"]:
                model.disable_input_require_grads()  # or backward never stops early
        with TORCH_LINEAR:
            passes.append({"active": active, **forward_backward(model, ids)})
    return {"passes": passes, "adam": adam(device), "bandwidth": bandwidth(device, dtype)}


def freeze_all_but(model: nn.Module, layers: list[int], outside: set[str]) -> None:
    """Let these layers and these modules outside them train; tied embeddings are the head, too."""
    decoder = model.get_decoder()
    modules = {"embed": model.get_input_embeddings(), "norm": decoder.norm, "head": model.get_output_embeddings()}
    for param in model.parameters():
        param.requires_grad_(False)
        param.grad = None
    for module in (*(modules[name] for name in outside), *(decoder.layers[layer] for layer in layers)):
        module.requires_grad_(True)


def forward_backward(model: nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Median seconds of each, after one warm-up, on the slowest rank."""
    times: dict[str, list[float]] = {"forward": [], "backward": []}
    for _ in range(1 + REPEATS):
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        finish_compute()
        middle = time.perf_counter()
        loss.backward()
        finish_compute()
        times["forward"].append(middle - begin)
        times["backward"].append(time.perf_counter() - middle)
    return {part: distributed.max_over_ranks(statistics.median(seconds[1:])) for part, seconds in times.items()}


def adam(device: str) -> dict[str, float]:
    """Seconds of torch's fused AdamW on a flat float32 tensor."""
    master = nn.Parameter(torch.zeros(ADAM_NUMEL, device=device))
    master.grad = torch.ones_like(master)
    optimizer = torch.optim.AdamW([master], lr=1e-4, fused=True)
    return {"numel": ADAM_NUMEL, "seconds": timed(optimizer.step)}


def bandwidth(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of the whole message per second of collectives of 16 MiB; empty on one rank."""
    ranks = distributed.world_size()
    if ranks == 1:
        return {}
    numel = MESSAGE_BYTES // dtype.itemsize // ranks
    whole = torch.zeros(numel * ranks, dtype=dtype, device=device)
    part = torch.zeros(numel, dtype=dtype, device=device)
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
    }
    return {name: whole.nbytes / timed(call) for name, call in calls.items()}


def timed(action: Callable[[], Any]) -> float:
    """Median seconds after one warm-up, on the slowest rank."""
    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        action()
        finish_compute()
        seconds.append(time.perf_counter() - begin)
    return distributed.max_over_ranks(statistics.median(seconds[1:]))
