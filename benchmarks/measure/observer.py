# SPDX-License-Identifier: Apache-2.0
"""What a process uses and what a step does: memory, disk, arithmetic, collectives."""

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.case import Case
from benchmarks.measure.engine import micro_step
from launch import distributed

COUNTED = ("flops", "rest_bytes", "peak_bytes")
_COLLECTIVES = {"allgather": "all_gather", "allreduce": "all_reduce", "reduce_scatter": "reduce_scatter"}


def peak_bytes() -> int:
    """Largest memory so far: of the device's allocator on a GPU, of the process (RSS) on the CPU."""
    accelerator = get_accelerator()
    return resident_bytes("VmHWM") if accelerator.device_name() == "cpu" else accelerator.max_memory_allocated()


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident memory of this process: ``VmRSS`` now, ``VmHWM`` at its largest."""
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def disk_bytes() -> dict[str, int]:
    """Bytes that all threads of this process have read from and written to disks so far."""
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(counters["read_bytes"]), "written": int(counters["write_bytes"])}


def reset_peak() -> None:
    """Let :func:`peak_bytes` count from now on, where the operating system allows it."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Observer(TorchDispatchMode):
    """Counts what torch dispatches while it is entered. It takes time, so steps that are timed are not observed.

    Memory is that of the accelerator; on the CPU it is that of all tensors.

    Args:
        host_bytes: bytes of live tensors that would be in host memory beside a GPU, and do not count.

    Attributes:
        flops: of matrix products and attention; a multiply-add counts twice, and causal masks save nothing.
        traffic, calls: collective -> bytes of the largest argument summed over calls; number of calls.
        rest_bytes, now, peak_bytes: live bytes when it was made, now, and at most.
    """

    def __init__(self, host_bytes: int = 0) -> None:
        super().__init__()
        self.flops = self.peak_bytes = 0
        self.now = -host_bytes
        self.traffic: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._device = torch.device(get_accelerator().current_device_name()).type
        self._storages: set[int] = set()
        for tensor in _live_tensors():
            self._add(tensor)
        self.rest_bytes = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._add(tensor)
        if func.namespace == "c10d":
            name = _collective(func)
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


def observe(engine: Any, case: Case, active: list[int] | None) -> dict[str, Any]:
    """One more optimizer step, observed; the largest of all ranks. State that it needs is allocated before it."""
    for unit in engine.optimizer.units if engine.grass is not None else ():
        if unit.active:
            engine.optimizer.store.ensure(unit)
    ids = torch.randint(0, 1000, (case.micro_batch, case.sequence)).to(engine.device)
    gc.collect()
    with Observer(_state_in_host_memory(engine)) as seen:
        for _ in range(case.accumulation):
            micro_step(engine, {"input_ids": ids, "labels": ids})
    counted = {name: int(distributed.max_over_ranks(getattr(seen, name))) for name in COUNTED}
    return {"active": active, "traffic": dict(seen.traffic), "calls": dict(seen.calls), **counted}


def memory(engine: Any) -> dict[str, dict[str, int]]:
    """Bytes on this rank by category and device: the peak so far; of stock engines what rests between steps."""
    if engine.grass is not None:
        return engine.grass.memory(peak=True)
    weights = [tensor for param in engine.module.parameters() for tensor in (param, getattr(param, "ds_tensor", None))]
    inner = engine.optimizer.optimizer
    state = _state_bytes(getattr(inner, "base_optimizer", inner))  # BAdam wraps another optimizer
    resting, other = ("host", "device") if engine.zero_cpu_offload() else ("device", "host")
    return {
        "weights": {"device": _bytes(tensor for tensor in weights if tensor is not None), "host": 0},
        "optimizer_state": {resting: state, other: 0},
    }


def _state_in_host_memory(engine: Any) -> int:
    """Bytes of optimizer state that rest in host memory, where the CPU is the accelerator and both look alike."""
    if get_accelerator().device_name() != "cpu":
        return 0
    if engine.grass is not None:
        return engine.optimizer.store.host_bytes
    return _state_bytes(engine.optimizer.optimizer) if engine.zero_cpu_offload() else 0


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """fp32 shards, their gradients and states. ZeRO-3 lends its optimizer the shards for the time of a step alone."""
    masters = [param for group in optimizer.param_groups for param in group["params"]]
    masters += [param for param in optimizer.state if isinstance(param, torch.Tensor)]
    gradients = [param.grad for param in masters if param.grad is not None]
    return _bytes([*masters, *gradients, *_tensors(dict(optimizer.state))])


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of their storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _live_tensors() -> Iterator[torch.Tensor]:
    """Tensors with memory that Python knows of, and their gradients."""
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or thing.layout is not torch.strided:
            continue
        yield thing
        if thing.is_leaf and thing.grad is not None:
            yield thing.grad


def _collective(func: Any) -> str:
    """``c10d::_reduce_scatter_base_`` -> ``reduce_scatter``."""
    name = func._schema.name.removeprefix("c10d::").strip("_")
    return next((full for prefix, full in _COLLECTIVES.items() if name.startswith(prefix)), name)


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func._overloadpacket
    name = packet.__name__
    # torch has no formula for attention on the CPU, nor for fewer key heads than query heads.
    if "scaled_dot_product" in name:
        products = 5 if name.endswith("backward") else 2
        query, key = args[1:3] if name.endswith("backward") else args[:2]
        return products * 2 * query.numel() * key.shape[-2]
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=result)
