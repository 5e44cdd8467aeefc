# SPDX-License-Identifier: Apache-2.0
"""A small ZeRO-3 run whose sizes can be told by hand. Run inside a rank."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from helpers.models import VOCAB, cyclic, ds_config, layer_of, tiny_llama
from helpers.small import ALIGNMENT, GRAIN, HIDDEN, LAYERS, PERIOD, STATE, width

LAYER = [p.numel() for p in tiny_llama(hidden=HIDDEN, layers=1).model.layers.parameters()]
NAMES = {name: param.numel() for name, param in tiny_llama(hidden=HIDDEN, layers=LAYERS).named_parameters()}
NORM, EMBED = [HIDDEN], [VOCAB * HIDDEN]
# No weight stays gathered for its own sake, and none is gathered ahead.
BARE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}
AHEAD = {**BARE, "stage3_prefetch_bucket_size": sum(LAYER) // 2}  # half a layer in advance
DEFAULT = {
    "stage3_param_persistence_threshold": 0
}  # a model of this size is gathered at once, and kept until backward
PERSISTENT = {**AHEAD, "stage3_param_persistence_threshold": HIDDEN}  # the norms


def part(numel: int, world: int) -> int:
    """Elements of a parameter on every rank."""
    return -(-numel // world)


def shard(sizes: list[int], world: int) -> int:
    """Elements of a unit on every rank: the parts of its parameters, aligned."""
    return -(-sum(part(size, world) for size in sizes) // ALIGNMENT) * ALIGNMENT


def config_of(zero: dict[str, Any], grass: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return ds_config(stage=3, grass={**cyclic(PERIOD), **grass}, zero_optimization=zero, **settings)


def weight_bytes(config: dict[str, Any], world: int) -> int:
    """Partitions of the whole model on one rank."""
    return width(config) * (LAYERS * shard(LAYER, world) + 2 * shard(EMBED, world) + shard(NORM, world))


def state_bytes(layers: int, world: int) -> int:
    """Optimizer state of ``layers`` layers and of the final norm on one rank, step counts aside."""
    return STATE * (layers * shard(LAYER, world) + shard(NORM, world))


def buffer_bytes(world: int) -> int:
    """Two device buffers, each as large as the largest shard that trains: a layer's."""
    return 2 * STATE * -(-shard(LAYER, world) // GRAIN) * GRAIN


def layers_in(names: Iterable[str]) -> set[int]:
    return {layer for name in names if (layer := layer_of(name)) is not None}


def status(model: nn.Module) -> set[str]:
    return {param.ds_status.name for param in model.parameters()}  # type: ignore[attr-defined]


def from_shards(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that all ranks' partitions make up."""
    whole = {}
    for name, param in model.named_parameters():
        parts = [torch.empty_like(param.ds_tensor) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, param.ds_tensor.contiguous())
        whole[name] = torch.cat(parts)[: param.ds_numel].view(param.ds_shape)
    return whole


@contextmanager
def calls_to(name: str, callback: Callable[[Any], None]) -> Iterator[None]:
    """Call ``callback`` at every call to a method of DeepSpeed's parameter coordinator; it gets the coordinator."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stock = getattr(PartitionedParameterCoordinator, name)

    def observed(self: Any, *args: Any, **kwargs: Any) -> Any:
        callback(self)
        return stock(self, *args, **kwargs)

    with mock.patch.object(PartitionedParameterCoordinator, name, observed):
        yield
