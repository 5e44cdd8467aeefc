# SPDX-License-Identifier: Apache-2.0
"""Cells of kind ``plain``: the arithmetic of a step in plain PyTorch, without any engine, on every rank at the same time.

What an engine adds to it is what it costs: see ``floors.seconds``.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from benchmarks.engines import finish_compute
from benchmarks.methods import METHODS, prepare_model
from launch import distributed

REPEATS = 3
ADAM_NUMEL = 4_000_000
MESSAGE_NUMEL = 8 * 2**20  # 16 MiB of bf16


def plain(args: argparse.Namespace, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Seconds of forward and backward for several sets of active layers, of AdamW per element, and of collectives per byte."""
    device = get_accelerator().current_device_name()
    model = prepare_model(args.method, model.to(device)).train()
    model.bfloat16()  # PEFT makes float32 adapters, which an engine casts back
    lora = METHODS[args.method].lora_rank is not None
    if args.checkpointing and not lora:
        model.disable_input_require_grads()  # or backward never stops early
    ids = torch.randint(0, 1000, (args.micro_batch, args.sequence), device=device)
    layers = len(model.get_decoder().layers)
    whole = (list(range(layers)), True)
    sets = [whole] if lora else [*((active, False) for active in active_sets(layers)), ([layers // 2], True), whole]
    points = []
    for active, embed in sets:
        if not lora:
            freeze(model, active, embed)
        points.append({"active": active, "embed": embed, **forward_backward(model, ids)})
    for param in model.parameters():
        param.grad = None
    return {"points": points, "adam": adam(device), "bandwidth": bandwidth(device)}


def active_sets(layers: int) -> list[list[int]]:
    """The top two, two in the middle, two at the bottom, and one and four around the middle: what a cost per layer is fitted to."""
    middle = layers // 2
    sets = ([layers - 2, layers - 1], [middle, layers - 1], [0, 1], [middle], list(range(middle, middle + 4)))
    return [[layer for layer in active if 0 <= layer < layers] for active in sets]


def freeze(model: nn.Module, active: list[int], embed: bool) -> None:
    """All but the final norm and the active layers; with ``embed`` the embeddings and the head train, too."""
    decoder = model.get_decoder()
    for param in model.parameters():
        param.requires_grad_(False)
        param.grad = None
    outside = [model.get_input_embeddings(), model.get_output_embeddings()] if embed else []
    for module in (decoder.norm, *outside, *(decoder.layers[layer] for layer in active)):
        module.requires_grad_(True)


def forward_backward(model: nn.Module, ids: torch.Tensor) -> dict[str, float]:
    """Median seconds of each after one warm-up; the slowest rank counts."""
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


def bandwidth(device: str) -> dict[str, float]:
    """Bytes per second of collectives of 16 MiB; bytes of the whole message, whatever crosses the wire. Empty on one rank."""
    ranks = distributed.world_size()
    if ranks == 1:
        return {}
    whole = torch.zeros(MESSAGE_NUMEL // ranks * ranks, dtype=torch.bfloat16, device=device)
    part = torch.zeros(whole.numel() // ranks, dtype=torch.bfloat16, device=device)
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
    }
    return {name: whole.nbytes / timed(call) for name, call in calls.items()}


def timed(action: Callable[[], Any]) -> float:
    """Median seconds after one warm-up; the slowest rank counts."""
    seconds = []
    for _ in range(1 + REPEATS):
        begin = time.perf_counter()
        action()
        finish_compute()
        seconds.append(time.perf_counter() - begin)
    return distributed.max_over_ranks(statistics.median(seconds[1:]))
