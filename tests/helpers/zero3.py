# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 configs of the small run, and which weights it gathers. Run inside a rank."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from helpers.models import cyclic, ds_config, layer_of, tiny_llama
from helpers.small import HIDDEN, LAYER, LAYERS, PERIOD

NAMES = {name: param.numel() for name, param in tiny_llama(hidden=HIDDEN, layers=LAYERS).named_parameters()}
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


def config_of(zero: dict[str, Any], grass: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return ds_config(stage=3, grass={**cyclic(PERIOD), **grass}, zero_optimization=zero, **settings)


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
