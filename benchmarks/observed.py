# SPDX-License-Identifier: Apache-2.0
"""What a step does, seen where torch dispatches its operators: arithmetic, collectives, live memory.

Observing takes time, so the steps that are timed are not observed.
"""

import argparse
import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.engines import step
from launch import distributed

_COLLECTIVES = {"allgather": "all_gather", "allreduce": "all_reduce", "reduce_scatter": "reduce_scatter"}


class Observer(TorchDispatchMode):
    """Counts while it is on, memory from what is alive when it is made. Memory is the accelerator's; on the CPU it is that of all tensors.

    Args:
        elsewhere: bytes among them that do not count, because beside a GPU they would be in host memory.

    Attributes:
        flops: of matrix products and attention, a multiply-add counting twice and nothing taken off for causal masks.
        traffic, calls: collective -> bytes of the largest argument of every call, summed; number of calls.
        rest_bytes, now, peak_bytes: live bytes to begin with, now, and at most.
    """

    def __init__(self, elsewhere: int = 0) -> None:
        super().__init__()
        self.flops = self.peak_bytes = 0
        self.now = -elsewhere
        self.traffic: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._device = torch.device(get_accelerator().current_device_name()).type
        self._storages: set[int] = set()
        for tensor in alive():
            self._add(tensor)
        self.rest_bytes = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._add(tensor)
        if func.namespace == "c10d":
            name = collective(func)
            self.calls[name] += 1
            self.traffic[name] += max(sum(tensor.nbytes for tensor in _tensors(argument)) for argument in args)
        else:
            self.flops += _flops(func, args, kwargs, result)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.now += size
        self.peak_bytes = max(self.peak_bytes, self.now)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size


def observe(engine: Any, args: argparse.Namespace, active: list[int] | None) -> dict[str, Any]:
    """One more optimizer step, observed; the largest of all ranks counts. State that the step needs is made before it."""
    for unit in engine.optimizer.units if engine.grass is not None else ():
        if unit.active:
            engine.optimizer.store.ensure(unit)
    ids = torch.randint(0, 1000, (args.micro_batch, args.sequence)).to(engine.device)
    gc.collect()
    with Observer(host_bytes(engine)) as seen:
        for _ in range(args.accumulation):
            step(engine, {"input_ids": ids, "labels": ids})
    return {
        "active": active,
        "flops": int(distributed.max_over_ranks(seen.flops)),
        "traffic": dict(seen.traffic),
        "calls": dict(seen.calls),
        "rest_bytes": int(distributed.max_over_ranks(seen.rest_bytes)),
        "peak_bytes": int(distributed.max_over_ranks(seen.peak_bytes)),
    }


def host_bytes(engine: Any) -> int:
    """Optimizer state that rests in host memory although it looks like the device's: where the CPU is the accelerator."""
    if get_accelerator().device_name() != "cpu":
        return 0
    optimizer = engine.optimizer
    if engine.grass is not None:
        return optimizer.store.host_bytes
    if not engine.zero_cpu_offload():
        return 0
    return _bytes(_state(optimizer.optimizer))


def memory(engine: Any) -> dict[str, dict[str, int]]:
    """Bytes on this rank by category and place: ours at most so far, as ``engine.grass.memory(peak=True)``; a stock engine's between steps."""
    if engine.grass is not None:
        return engine.grass.memory(peak=True)
    weights = [tensor for param in engine.module.parameters() for tensor in (param, getattr(param, "ds_tensor", None))]
    inner = engine.optimizer.optimizer
    state = _bytes(_state(getattr(inner, "base_optimizer", inner)))  # BAdam's wraps another
    place, other = ("host", "device") if engine.zero_cpu_offload() else ("device", "host")
    return {
        "weights": {"device": _bytes(tensor for tensor in weights if tensor is not None), "host": 0},
        "optimizer_state": {place: state, other: 0},
    }


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What it steps, which ZeRO makes of fp32 shards, with gradients and states. ZeRO-3 gives it weights for the time of a step alone."""
    masters = [param for group in optimizer.param_groups for param in group["params"]]
    masters += [param for param in optimizer.state if isinstance(param, torch.Tensor)]
    gradients = [param.grad for param in masters if param.grad is not None]
    return [*masters, *gradients, *_tensors(dict(optimizer.state))]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def alive() -> Iterator[torch.Tensor]:
    """Tensors with memory that Python knows of, and their gradients."""
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or thing.layout is not torch.strided:
            continue
        yield thing
        if thing.is_leaf and thing.grad is not None:
            yield thing.grad


def collective(func: Any) -> str:
    """``c10d::_reduce_scatter_base_`` -> ``reduce_scatter``."""
    name = func._schema.name.removeprefix("c10d::").strip("_")
    return next((said for spelled, said in _COLLECTIVES.items() if name.startswith(spelled)), name)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func._overloadpacket
    name = packet.__name__
    # torch has no formula for attention on the CPU, nor for fewer key heads than query heads
    if "scaled_dot_product" in name:
        products = 5 if name.endswith("backward") else 2
        query, key = args[1:3] if name.endswith("backward") else args[:2]
        return products * 2 * query.numel() * key.shape[-2]
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)
