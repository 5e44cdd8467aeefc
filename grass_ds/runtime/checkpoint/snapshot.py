# SPDX-License-Identifier: Apache-2.0
"""A copy of a state dict that no longer changes, in host memory."""

import copy
from collections.abc import Mapping
from typing import Any

import torch


def snapshot(value: Any) -> Any:
    """Copy ``value`` with all that it holds; its tensors in host memory.

    Tensors that share storage share it in the copy, and whole storages are copied, as ``torch.save`` writes them: the file of the
    copy is that of the original, byte for byte. Peak: one more copy of every storage.
    """
    return _copy(value, {})


def _copy(value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Tensor):
        return _copy_tensor(value, storages)
    if isinstance(value, Mapping):
        copied: Any = copy.copy(value)
        for key, item in value.items():
            copied[key] = _copy(item, storages)
        return copied
    if isinstance(value, (list, tuple)):
        items = [_copy(item, storages) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)


def _copy_tensor(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    source = tensor.untyped_storage()
    key = source._cdata
    if key not in storages:
        storages[key] = source.clone() if source.device.type == "cpu" else source.cpu()
    copied = torch.empty(0, dtype=tensor.dtype)
    return copied.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
