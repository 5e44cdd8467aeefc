# SPDX-License-Identifier: Apache-2.0
"""Layer-sampled ZeRO-1/2: every rank has all low-precision weights, and one shard of everything else."""

from collections.abc import Mapping, Sequence

from deepspeed import comm as dist
from torch import nn

from grass_ds.core.units import ReplicatedUnit, Unit
from grass_ds.sampling.schedule import Phase
from grass_ds.zero.fragments import ParamFragment
from grass_ds.zero.optimizer import GrassZeroOptimizer


class GrassZero12Optimizer(GrassZeroOptimizer):
    """One all-gather per active unit brings the updated weights to all ranks.

    Stage 1 sums the full local gradients of the active units over an accumulation window and reduces them once, at the
    boundary. While layer importance is measured it reduces every micro-batch, as stage 2 does: importance is the root
    mean square over micro-batches, whatever their number.
    """

    def _reduces_now(self) -> bool:
        measures = self.controller.measuring or self.controller.phase is Phase.PROBE
        return self.stage == 2 or measures or self.engine.is_gradient_accumulation_boundary()

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Stage 1: called by the engine at the boundary, after backward or in ``step()`` if the caller sets it."""
        if not self.reducer.shards:
            self.reducer.reduce_remaining()

    def _sync_weights(self, units: Sequence[Unit]) -> None:
        for unit in units:
            assert isinstance(unit, ReplicatedUnit)
            if unit.world > 1:
                dist.all_gather_into_tensor(unit.flat, unit.shard.clone(), group=self.dp_process_group)

    def undo_assignments(self) -> None:
        for unit in self.units:
            unit.rebind()

    def _attach(self, slots: Mapping[nn.Parameter, tuple[Unit, int]]) -> None:
        for param, slot in slots.items():
            self._fragment(*slot).attach(param)

    def _detach(self) -> None:
        for unit in self.units:
            for param in unit.params:
                ParamFragment.detach(param)
