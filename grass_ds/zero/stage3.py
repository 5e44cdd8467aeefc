# SPDX-License-Identifier: Apache-2.0
"""Layer-sampled ZeRO-3: of the weights, too, a rank has only its shard.

Partitioning, gathering and prefetching of the weights are DeepSpeed's own: its ``DeepSpeedZeRoOffload``, which serves models without an
optimizer as it is and asks nothing of the one that it gets. Gradients, norms, state and steps are those of the other stages: a unit's
shard is here the partitions of its parameters in a row, so that one reduce-scatter of a unit's gradient gives every rank the gradient
of just the weights that it has, and no gather is needed after the step.

[Note: Trace] DeepSpeed records in which order modules run in forward and backward, and gathers weights ahead of their use by that
trace. Inactive layers change nothing in the order, with one exception: where the embeddings do not train, backward stops at the lowest
active layer. A trace that is too short makes DeepSpeed start over in the middle of backward, and one that is too long makes it gather
weights that nobody uses. So there is a trace for every floor: a coordinator of its own, which takes over at the start of the first training
forward with that floor (not earlier: an evaluation in between would be recorded, which has no backward). A floor's first step records, all
later ones prefetch; recording, and deciding by a new trace what to release when, takes longer than a step of a small model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.core import deepspeed_compat
from grass_ds.core.units import Unit
from grass_ds.zero.fragments import ParamFragment
from grass_ds.zero.optimizer import GrassZeroOptimizer
from grass_ds.zero.partitioned import Partition, PartitionedAccess


def _same_place(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.device == other.device


class GrassZero3Optimizer(GrassZeroOptimizer):
    """The weights' side of ZeRO-3 around :class:`~grass_ds.zero.optimizer.GrassZeroOptimizer`.

    Args:
        parameter_offload: DeepSpeed's hooks on the model, which gather and release weights.
        full_backward: backward runs down to the embeddings whatever is active.

    Attributes:
        coordinators: floor of backward -> DeepSpeed's coordinator that has the trace of such passes.
    """

    _destroyed = False

    def __init__(self, *args: Any, parameter_offload: deepspeed_compat.DeepSpeedZeRoOffload, full_backward: bool):
        self.parameter_offload = parameter_offload
        self.persistent_parameters: list[nn.Parameter] = parameter_offload.persistent_parameters
        self.module = parameter_offload.module
        self._full_backward = full_backward
        self._floor = self._traced_floor = 0
        self.coordinators = {0: parameter_offload.get_param_coordinator()}
        self._recorded: set[int] = set()  # floors by whose trace something may have been decided
        self._access = PartitionedAccess()
        self._kept: dict[nn.Parameter, torch.Tensor] = {}  # where the persistent parameters were left
        self._assigned: dict[nn.Parameter, None] = {}
        super().__init__(*args)  # which activates the first layers, and so needs the above
        for param in self.module.parameters():
            param._z3_optimizer = self._access
        self._settle()
        self._remember()

    @property
    def fp16_groups(self) -> list[list[nn.Parameter]]:
        """Parameters per flat group, as DeepSpeed's checkpoint code wants them: one group per unit."""
        return [unit.params for unit in self.units]

    # ---- weights between the steps --------------------------------------------------------------------------------------

    def backward_epilogue(self, **kwargs: Any) -> None:
        """End of one micro-step: also of modules that backward ran through without an end, like the lowest active layer."""
        super().backward_epilogue(**kwargs)
        self.parameter_offload.release_backward_leftovers()
        self._remember()
        complete = self.coordinators[self._traced_floor].is_complete_trace()
        if self._traced_floor in self._recorded and not complete:
            # Modules ran in another order, and DeepSpeed starts over. By the old trace it would keep weights that the new one does not need.
            self._recorded.remove(self._traced_floor)
            deepspeed_compat.forget_releases()

    def _publish(self, units: Sequence[Unit]) -> None:
        """Release what is gathered of the old weights; of the persistent parameters, gather the new ones."""
        if any(param.ds_status is deepspeed_compat.ZeroParamStatus.INFLIGHT for param in self.module.parameters()):
            self.parameter_offload.partition_all_parameters()  # prefetched by an evaluation for a backward that did not come
        params: list[Any] = [param for unit in units for param in unit.params]
        params += self._find_assigned()
        stale = [
            param for param in dict.fromkeys(params) if param.ds_status is deepspeed_compat.ZeroParamStatus.AVAILABLE
        ]
        for param in stale:
            param.ds_active_sub_modules.clear()
            param.partition()
        self._settle()
        self._gather([param for param in stale if param.ds_persist])
        self._assigned.clear()
        self._remember()

    def drop_assigned(self) -> None:
        if self._find_assigned():
            self._publish([])
        self._remember()

    def _remember(self) -> None:
        """Where the persistent parameters are. What is remembered stays allocated, so that nothing else takes its address."""
        available = deepspeed_compat.ZeroParamStatus.AVAILABLE
        self._kept = {p: p.data for p in self.persistent_parameters if p.ds_status is available}  # type: ignore[attr-defined]

    def _find_assigned(self) -> list[Any]:
        """Persistent parameters that were assigned since the last step. The same ones on every rank.

        Those are not where they were left. DeepSpeed, too, gathers some anew, but within a forward and backward pass: what is found
        before it counts, and after it all is remembered anew.
        """
        available = deepspeed_compat.ZeroParamStatus.AVAILABLE
        kept: list[tuple[Any, torch.Tensor]] = list(self._kept.items())
        moved = [p for p, data in kept if p.ds_status is available and not _same_place(p.data, data)]
        self._assigned.update(dict.fromkeys(moved))
        return list(self._assigned)

    def refresh_fp32_params(self) -> None:
        """As in the other stages. Weights that were assigned are refused: a rank has its part of them nowhere."""
        with self._together():
            if any(self._differs(param) for param in self._find_assigned()):
                raise ValueError(
                    "weights were replaced by `param.data = ...`, which ZeRO-3 cannot take over: change them in place, within "
                    "`with deepspeed.zero.GatheredParameters(params, modifier_rank=0)`"
                )
        super().refresh_fp32_params()

    def _differs(self, param: Any) -> bool:
        """Whether a gathered parameter holds other values than this rank's part of it."""
        part = param.ds_tensor.numel()
        start = part * dist.get_rank(group=self.dp_process_group)
        mine = param.data.flatten()[start : start + part]
        return not torch.equal(mine, param.ds_tensor[: mine.numel()].to(mine))

    @staticmethod
    def _gather(params: Sequence[Any]) -> None:
        """All of them that are released, in one all-gather."""
        released = [param for param in params if param.ds_status is deepspeed_compat.ZeroParamStatus.NOT_AVAILABLE]
        if released:
            released[0].all_gather_coalesced(released).wait()

    @staticmethod
    def _settle() -> None:
        """Wait until shards are written: DeepSpeed gathers from them on a stream of its own, which waits for no other."""
        if not get_accelerator().is_synchronized_device():
            get_accelerator().current_stream().synchronize()

    def activate(self) -> None:
        super().activate()
        self._floor = 0 if self._full_backward else min(self.controller.active_layers)

    def clear_backward_seen_flag(self) -> None:
        """Called by the engine at the start of every forward. See [Note: Trace]."""
        super().clear_backward_seen_flag()
        self._find_assigned()
        # Not module.training: models come from ``from_pretrained`` in evaluation mode, and train as well in it.
        if self._floor != self._traced_floor and torch.is_grad_enabled():
            if self._floor not in self.coordinators:
                self.coordinators[self._floor] = deepspeed_compat.untraced(self.parameter_offload.param_coordinator)
            self.parameter_offload.param_coordinator = self.coordinators[self._floor]
            self._traced_floor = self._floor
        if not self.coordinators[self._traced_floor].is_invalid_trace():
            self._recorded.add(self._traced_floor)  # complete once this pass begins, be it an evaluation

    def _expose(self, param: nn.Parameter, fragment: ParamFragment) -> None:
        self._access.add(param, Partition(fragment))

    def _conceal(self, param: nn.Parameter) -> None:
        pass  # destroy() takes the one object off all parameters

    # ---- what else the engine asks of a ZeRO-3 optimizer ----------------------------------------------------------------

    def checkpoint_event_prologue(self) -> None:
        """Before weights are saved or loaded: all of them partitioned."""
        self.parameter_offload.partition_all_parameters()

    def checkpoint_event_epilogue(self) -> None:
        """After that."""
        self._settle()
        self._gather(self.persistent_parameters)
        self._remember()

    def empty_partition_cache(self) -> None:
        """Release every weight that is gathered (``engine.empty_partition_cache()``)."""
        self.parameter_offload.empty_partition_cache()

    def destroy(self) -> None:
        """As in the other stages; the weights stay partitioned, as after DeepSpeed's own. Later calls do nothing."""
        if self._destroyed:  # by now the model may be another engine's, and a collected engine calls this again
            return
        self._destroyed = True
        super().destroy()
        deepspeed_compat.remove_zero3_hooks(self.parameter_offload)
        deepspeed_compat.forget_releases()  # that memory holds on to the model
        for param in self.module.parameters():
            if getattr(param, "_z3_optimizer", None) is self._access:
                del param._z3_optimizer
