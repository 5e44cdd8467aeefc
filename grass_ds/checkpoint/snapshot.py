# SPDX-License-Identifier: Apache-2.0
"""A copy of a state dict that no longer changes, in host memory."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def snapshot(value: Any) -> Any:
    """Copy ``value`` and everything in it, tensors to host memory.

    Objects and storages that are shared in ``value`` are shared in the copy, and storages are copied as a whole, as
    ``torch.save`` writes them. So both give the same file, byte for byte. Memory: one more copy of every storage.
    """
    return _Copier().copy(value)


class _Copier:
    """Copies each object and each storage once."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}
        self._storages: dict[int, torch.UntypedStorage] = {}

    def copy(self, value: Any) -> Any:
        if id(value) not in self._objects:
            self._objects[id(value)] = self._copy(value)
        return self._objects[id(value)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._copy_tensor(value)
        if isinstance(value, Mapping):
            copied: Any = copy.copy(value)
            for key, item in value.items():
                copied[key] = self.copy(item)
            return copied
        if isinstance(value, (list, tuple)):
            items = [self.copy(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return copy.deepcopy(value)

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or _is_lazy(tensor):
            return copy.deepcopy(tensor.detach().cpu())
        source = tensor.untyped_storage()
        key = source._cdata
        if key not in self._storages:
            self._storages[key] = source.clone() if source.device.type == "cpu" else source.cpu()
        copied = torch.empty(0, dtype=tensor.dtype)
        copied.set_(self._storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(copied, tensor.requires_grad)
        return copied.requires_grad_(tensor.requires_grad)


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether its values differ from those in its storage."""
    return tensor.is_conj() or tensor.is_neg() or tensor.is_quantized
