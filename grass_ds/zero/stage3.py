# SPDX-License-Identifier: Apache-2.0
"""Layer-sampled ZeRO-3: a rank has only its shard of the weights, too.

DeepSpeed's ``DeepSpeedZeRoOffload`` partitions, gathers and prefetches the weights, as for models without an
optimizer. A unit's shard is the partitions of its parameters in a row: one reduce-scatter of the unit's gradient gives
every rank the gradient of its own weights, and a step needs no gather at its end.

[Note: Trace] DeepSpeed records the order in which modules run, and gathers weights by that trace. Where the embeddings
do not train, backward stops at the lowest active layer. With a trace that is too short DeepSpeed starts over in the
middle of backward; with one that is too long it gathers weights that nobody uses. So each lowest active layer (or set
of active weights in the lowest block) has its own coordinator with its own trace. It is swapped in at the start of the
first training forward with that layer: an evaluation before has no backward, and would be recorded.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.core import deepspeed_compat
from grass_ds.core.deepspeed_compat import ZeroParamStatus
from grass_ds.core.units import Unit, same_memory
from grass_ds.zero.fragments import PartitionedAccess
from grass_ds.zero.optimizer import GrassZeroOptimizer

EVERYTHING: tuple[int, ...] = (0,)  # key of passes through all blocks
MOST_TRACES = 256  # more than blocks in a model; the sets of weights in them are still more


def _is_gathered(param: Any) -> bool:
    return param.ds_status is ZeroParamStatus.AVAILABLE


class GrassZero3Optimizer(GrassZeroOptimizer):
    """:class:`~grass_ds.zero.optimizer.GrassZeroOptimizer` with partitioned weights.

    Args:
        parameter_offload: DeepSpeed's hooks on the model, which gather and release weights.
        full_backward: backward runs down to the embeddings, whichever layers are active.
    """

    _destroyed = False

    def __init__(self, *args: Any, parameter_offload: deepspeed_compat.DeepSpeedZeRoOffload, full_backward: bool):
        self.parameter_offload = parameter_offload
        self.persistent_parameters: list[nn.Parameter] = parameter_offload.persistent_parameters
        self.module = parameter_offload.module
        self._full_backward = full_backward
        # lowest layers that backward reaches -> DeepSpeed's coordinator with the trace of such passes
        self.coordinators = {EVERYTHING: parameter_offload.get_param_coordinator()}
        self._lowest = EVERYTHING  # key of the coordinator in use
        self._recorded: set[tuple[int, ...]] = set()  # keys of those whose trace DeepSpeed may have used already
        self._persistent_data: dict[nn.Parameter, torch.Tensor] = {}  # as of the end of the last step
        self._assigned: dict[nn.Parameter, None] = {}
        super().__init__(*args)  # which activates the first layers, and so needs the above
        self._wait_for_shards()
        self._track_persistent()

    def clear_backward_seen_flag(self) -> None:
        """The engine calls it at the start of every forward."""
        super().clear_backward_seen_flag()
        self._find_assigned()
        lowest = self.lowest_block
        layers = {unit.layer for unit in self._tracked if unit.layer is not None and unit.depth == lowest}
        self._choose_trace(EVERYTHING if self._full_backward else tuple(sorted(layers)))

    def _choose_trace(self, lowest: tuple[int, ...]) -> None:
        """Use the trace of passes down to the layers ``lowest``, unless this forward is an evaluation."""
        # Not module.training: models come from ``from_pretrained`` in evaluation mode, in which they can train, too.
        if lowest != self._lowest and torch.is_grad_enabled():
            offload = self.parameter_offload
            if lowest not in self.coordinators:
                if len(self.coordinators) >= MOST_TRACES:  # the oldest, which no pass uses now
                    oldest = next(key for key in self.coordinators if key not in (EVERYTHING, self._lowest))
                    self.coordinators.pop(oldest)
                    self._recorded.discard(oldest)
                    deepspeed_compat.clear_release_cache()  # which would keep it alive
                self.coordinators[lowest] = deepspeed_compat.without_trace(offload.param_coordinator)
            offload.param_coordinator = self.coordinators[lowest]
            self._lowest = lowest
        if not self.coordinators[self._lowest].is_invalid_trace():
            self._recorded.add(self._lowest)  # complete once this pass begins, even an evaluation

    def backward_epilogue(self, **kwargs: Any) -> None:
        """End of one micro-step: release what DeepSpeed has not, and clear its decisions if it starts a new trace."""
        super().backward_epilogue(**kwargs)
        # Backward does not reach the input of the lowest active layer, so DeepSpeed does not see that layer's end.
        self.parameter_offload.release_backward_leftovers()
        if self._lowest in self._recorded and not self.coordinators[self._lowest].is_complete_trace():
            self._recorded.remove(self._lowest)  # modules ran in another order
            deepspeed_compat.clear_release_cache()
        self._track_persistent()

    def _sync_weights(self, units: Sequence[Unit]) -> None:
        """Release gathered weights that are out of date; gather persistent parameters again."""
        if any(param.ds_status is ZeroParamStatus.INFLIGHT for param in self.module.parameters()):
            self.parameter_offload.partition_all_parameters()  # prefetched in an evaluation, which has no backward
        params: list[Any] = [param for unit in units for param in unit.params] + self._find_assigned()
        stale = [param for param in dict.fromkeys(params) if _is_gathered(param)]
        for param in stale:
            param.ds_active_sub_modules.clear()
            param.partition()
        self._gather([param for param in stale if param.ds_persist])
        self._assigned.clear()
        self._track_persistent()

    def undo_assignments(self) -> None:
        if self._find_assigned():
            self._sync_weights([])
        self._track_persistent()

    def _track_persistent(self) -> None:
        """Keep the storage of the persistent parameters, so that no other tensor gets its address meanwhile."""
        self._persistent_data = {param: param.data for param in self.persistent_parameters if _is_gathered(param)}

    def _find_assigned(self) -> list[Any]:
        """Persistent parameters assigned by ``param.data = ...`` since the last step; the same ones on every rank.

        Their storage has changed since then. DeepSpeed's gathers change it, too, but only within a pass: so this looks
        before a pass, and storage is tracked anew after it.
        """
        for param, data in self._persistent_data.items():
            if _is_gathered(param) and not same_memory(param, data):
                self._assigned[param] = None
        return list(self._assigned)

    def refresh_fp32_params(self) -> None:
        """As in the other stages. Raises ValueError on every rank if a parameter was assigned other values."""
        with self._raise_on_all_ranks():
            if any(self._differs(param) for param in self._find_assigned()):
                raise ValueError(
                    "weights were replaced by `param.data = ...`, which ZeRO-3 cannot take over: change them in place, "
                    "within `with deepspeed.zero.GatheredParameters(params, modifier_rank=0)`"
                )
        super().refresh_fp32_params()

    def _differs(self, param: Any) -> bool:
        """Whether a gathered parameter holds other values than this rank's part of it."""
        part = param.ds_tensor.numel()
        start = part * dist.get_rank(group=self.dp_process_group)
        mine = param.data.flatten()[start : start + part]
        return not torch.equal(mine, param.ds_tensor[: mine.numel()].to(mine))

    def _gather(self, params: Sequence[Any]) -> None:
        """Gather those that are released, in one all-gather, once the shards are written."""
        self._wait_for_shards()
        released = [param for param in params if param.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if released:
            released[0].all_gather_coalesced(released).wait()

    @staticmethod
    def _wait_for_shards() -> None:
        """Wait until shards are written: DeepSpeed's all-gather stream does not wait for the current stream."""
        if not get_accelerator().is_synchronized_device():
            get_accelerator().current_stream().synchronize()

    def _attach(self, slots: Mapping[nn.Parameter, tuple[Unit, int]]) -> None:
        full = {param: self._fragment(*slot) for param, slot in slots.items()}
        local = {param: self._fragment(*slot, partition=True) for param, slot in slots.items()}
        access = PartitionedAccess(full, local)
        for param in self.module.parameters():
            param._z3_optimizer = access

    def _detach(self) -> None:
        for param in self.module.parameters():
            vars(param).pop("_z3_optimizer", None)

    def checkpoint_event_prologue(self) -> None:
        """Partition all weights, before they are saved or loaded."""
        self.parameter_offload.partition_all_parameters()

    def checkpoint_event_epilogue(self) -> None:
        """Gather the persistent parameters again, after weights were saved or loaded."""
        self._gather(self.persistent_parameters)
        self._track_persistent()

    def empty_partition_cache(self) -> None:
        """Release all gathered weights (``engine.empty_partition_cache()``)."""
        self.parameter_offload.empty_partition_cache()

    def destroy(self) -> None:
        """As in the other stages. The weights stay partitioned, as after DeepSpeed's own."""
        if self._destroyed:  # the garbage collector calls this again, when the model may belong to another engine
            return
        self._destroyed = True
        super().destroy()
        deepspeed_compat.remove_zero3_hooks(self.parameter_offload)
        deepspeed_compat.clear_release_cache()  # its cache keeps the model alive
