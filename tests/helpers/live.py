# SPDX-License-Identifier: Apache-2.0
"""Memory that is really there: the storages that are alive, and what the kernel counts. Run inside a rank."""

import gc
import re
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensors = Iterable[torch.Tensor]


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class LiveBytes(TorchDispatchMode):
    """Bytes held by the storages of ``known`` and of all tensors met while this is on.

    ``sizes``: count only storages of these sizes. ``ignore``: tensors whose storages do not count.
    """

    def __init__(self, known: Tensors = (), sizes: set[int] | None = None, ignore: Tensors = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes = sizes
        self._storages = {id(tensor.untyped_storage()) for tensor in ignore}
        for tensor in known:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._storages or (self._sizes is not None and size not in self._sizes):
            return
        self._storages.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._add(tensor)
        return result


def wait_for_bytes(live: LiveBytes, expected: int) -> int:
    """Bytes alive, after up to 10 s of waiting for ``expected``: gloo's threads keep what they sent a moment longer."""
    deadline = time.monotonic() + 10
    while live.now != expected and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.002)
    return live.now


def hooks_on(model: nn.Module) -> int:
    """Hooks on the model and on its parameters."""
    on_params = [(p._post_accumulate_grad_hooks, p._backward_hooks) for p in model.parameters()]
    on_modules = [(m._forward_hooks, m._forward_pre_hooks, m._backward_hooks) for m in model.modules()]
    return sum(len(hooks or ()) for owner in (*on_params, *on_modules) for hooks in owner)


def process_bytes(key: str) -> int:
    """What the kernel counts for this process: ``VmRSS``, ``VmLck`` and others."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
