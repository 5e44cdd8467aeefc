# SPDX-License-Identifier: Apache-2.0
"""A copy of a state dict that no longer changes, in host memory."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves


def snapshot(value: Any) -> Any:
    """Copy ``value`` and everything in it, the tensors of its dicts, lists and tuples to host memory.

    Objects and storages that are shared in ``value`` are shared in the copy, and storages are copied as a whole, as
    ``torch.save`` writes them. So both give the same file, byte for byte. Memory: one more copy of every storage.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return copy.deepcopy(value, {id(tensor): _copy(tensor, storages) for tensor in tensors})


def _copy(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    lazy = tensor.is_conj() or tensor.is_neg() or tensor.is_quantized  # values differ from those in the storage
    if lazy or type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return copy.deepcopy(tensor.detach().cpu())
    source = tensor.untyped_storage()
    key = source._cdata
    if key not in storages:
        storages[key] = source.clone() if source.device.type == "cpu" else source.cpu()
    copied = torch.empty(0, dtype=tensor.dtype)
    copied.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(copied, tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad)
