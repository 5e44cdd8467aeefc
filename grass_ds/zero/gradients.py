# SPDX-License-Identifier: Apache-2.0
"""Gradients of the active units: collected in flat buffers, reduce-scattered once per unit, measured, kept or dropped.

[Note: Order of the reductions] Every rank must issue the same collectives in the same order, or they mix without an
error. Which units are complete may differ between ranks, for example if one rank's batch does not use a module. So
units are reduced in their fixed order, in which backward completes them on an ordinary model. Units that backward
leaves incomplete are padded with zeros and reduced at the end of the micro-step.

[Note: Side stream] With ``overlap_comm`` the collective, the measurement and the accumulation run on one side stream.
It waits for the compute stream before each reduction; the compute stream waits for it once, at the end of the
micro-step. The flat buffer is allocated on the compute stream and read on the side stream, hence ``record_stream``.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.core import deepspeed_compat
from grass_ds.core.signs import pack_signs, unpack_signs
from grass_ds.core.units import Unit


@dataclass
class _Pending:
    """A unit's local gradient: ``filled`` slots hold data, ``arrived`` ones got some in this micro-step."""

    flat: torch.Tensor | None = None
    filled: set[int] = field(default_factory=set)
    arrived: set[int] = field(default_factory=set)


def squared_norm(shard: torch.Tensor) -> torch.Tensor:
    """Float32 scalar."""
    return torch.linalg.vector_norm(shard, dtype=torch.float32).square()


class GradientReducer:
    """Averages the tracked units' gradients over the data-parallel ranks, one reduce-scatter per unit.

    Args:
        engine: its settings say how gradients cross ranks.
        on_reduced: called with each unit whose gradient has gone out, in the order of the units.

    Attributes:
        shards: unit -> averaged gradient summed over micro-steps, [shard_numel], DeepSpeed's ``grad_accum_dtype``;
            empty while probing.
        signs: expanded unit -> signs of that gradient, see :func:`pack_signs`, from the end of the window on.
        squares: unit -> squared norm of this rank's shard of a micro-step's averaged gradient, summed over
            micro-steps; float32 scalar.
        micro_steps: backward passes since :meth:`clear`; ``discarded``: those whose gradients were dropped.
        arrived: units that got a gradient on this rank since then.
        warned: units with a warning that they got none.
        peak_bytes: high-water mark of gradient memory held here.
    """

    def __init__(self, engine: deepspeed_compat.DeepSpeedEngine, on_reduced: Callable[[Unit], None]):
        self._group = engine.seq_data_parallel_group
        # Ranks of one sequence-parallel group hold parts of one sample.
        samples = dist.get_world_size(group=self._group) / deepspeed_compat.sequence_parallel_size()
        self._divisor = samples if engine.gradient_average else 1
        self._comm_dtype = engine.communication_data_type
        _, self._accum_dtype = engine.get_data_types()
        # In ZeRO-1 the local flat gradients accumulate over micro-steps, too.
        self._flat_dtype = self._accum_dtype if engine.zero_optimization_stage() == 1 else self._comm_dtype
        overlap = engine.zero_overlap_comm() and not get_accelerator().is_synchronized_device()
        self._stream = get_accelerator().Stream() if overlap else None
        self._on_reduced = on_reduced
        self._at_boundary = engine.is_gradient_accumulation_boundary
        self.warned: set[Unit] = set()
        self.peak_bytes = 0
        self.track([], keep=True)

    def track(self, units: Sequence[Unit], keep: bool) -> None:
        """Collect the gradients of these units, in reduction order; without ``keep`` only measure them."""
        self._units, self._keep = list(units), keep
        self.clear()

    def clear(self) -> None:
        """Discard all gradients and start a new accumulation window."""
        self._pending = {unit: _Pending() for unit in self._units}
        self._next = 0  # units before this position were reduced in this micro-step
        self.shards: dict[Unit, torch.Tensor] = {}
        self.signs: dict[Unit, torch.Tensor] = {}
        self.squares: dict[Unit, torch.Tensor] = {}
        self.arrived: set[Unit] = set()
        self.micro_steps = self.discarded = 0

    def discard(self) -> None:
        """Discard all gradients, and stay in this accumulation window."""
        discarded = self.discarded + self.micro_steps
        self.clear()
        self.discarded = discarded

    @property
    def nbytes(self) -> int:
        """Bytes of gradient held now."""
        flats = sum(p.flat.nbytes for p in self._pending.values() if p.flat is not None)
        return flats + sum(kept.nbytes for kept in (*self.shards.values(), *self.signs.values()))

    def add_gradient(self, unit: Unit, slot: int, param: nn.Parameter, reduce_now: bool) -> None:
        """Move ``param.grad`` into its unit's flat buffer, then reduce what is complete if ``reduce_now``."""
        grad, param.grad = param.grad, None
        pending = self._pending.get(unit)
        if pending is None or grad is None:  # an inactive layer
            return
        if pending.flat is None:
            pending.flat = self._zeros(unit)
            pending.filled.clear()
            self._update_peak()
        # Filled already: by an earlier micro-step, or by a first firing in this backward (reentrant checkpointing).
        unit.write_gradient(pending.flat, slot, grad, accumulate=slot in pending.filled)
        pending.filled.add(slot)
        pending.arrived.add(slot)
        self.arrived.add(unit)
        if reduce_now:
            self._reduce_complete()

    def take_signs(self, unit: Unit) -> torch.Tensor:
        """Signs of an expanded unit's gradient, see :func:`pack_signs`, which are not kept any longer."""
        if unit in self.signs:
            return self.signs.pop(unit)
        return pack_signs(self.shards.pop(unit))  # the caller ended the window after backward

    def finish_micro_step(self, reduce_now: bool) -> None:
        """End of one backward pass."""
        if reduce_now:
            self.reduce_remaining()
        for pending in self._pending.values():
            pending.arrived.clear()
        self._next = 0
        self.micro_steps += 1

    def reduce_remaining(self) -> None:
        """Reduce every tracked unit that has not been reduced since the last micro-step; wait for the side stream."""
        for position, unit in enumerate(self._units):
            if position >= self._next or self._pending[unit].flat is not None:
                self._reduce(unit)
        self._next = len(self._units)
        if self._stream is not None:
            get_accelerator().current_stream().wait_stream(self._stream)

    def _reduce_complete(self) -> None:
        while self._next < len(self._units):
            unit = self._units[self._next]
            if len(self._pending[unit].arrived) < len(unit.params):
                return
            self._reduce(unit)
            self._next += 1

    def _reduce(self, unit: Unit) -> None:
        pending = self._pending[unit]
        flat = self._zeros(unit) if pending.flat is None else pending.flat
        pending.flat = None
        flat = (flat.div_(self._divisor) if self._divisor != 1 else flat).to(self._comm_dtype)
        with self._side_stream(flat):
            shard = torch.empty(unit.shard_numel, dtype=self._comm_dtype, device=flat.device)
            dist.reduce_scatter_tensor(shard, flat, group=self._group)
            self._accept(unit, shard, flat.nbytes)
        self._on_reduced(unit)

    def _accept(self, unit: Unit, shard: torch.Tensor, in_flight: int) -> None:
        """Measure a reduced shard, and keep it if asked; ``in_flight`` bytes of its flat gradient are still held."""
        self._update_peak(in_flight + shard.nbytes)
        self.squares[unit] = self.squares.get(unit, 0) + squared_norm(shard)
        if unit.expanded and self._at_boundary():
            total = shard if unit not in self.shards else self.shards.pop(unit).add_(shard)
            if unit in self.signs:  # several backward passes in the last micro-step: each has a vote
                total = total.sign().add_(unpack_signs(self.signs[unit], unit.shard_numel))
            self.signs[unit] = pack_signs(total)
        elif self._keep and unit in self.shards:
            self.shards[unit].add_(shard)
        elif self._keep:
            self.shards[unit] = kept = shard.to(self._accum_dtype)
            self._update_peak(in_flight + (0 if kept is shard else shard.nbytes))

    def _zeros(self, unit: Unit) -> torch.Tensor:
        """A flat gradient of zeros, which stay where this rank has no gradient, and in the padding."""
        return torch.zeros(unit.padded_numel, dtype=self._flat_dtype, device=unit.device)

    @contextmanager
    def _side_stream(self, flat: torch.Tensor) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        accelerator = get_accelerator()
        self._stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(self._stream):
            yield
        flat.record_stream(self._stream)

    def _update_peak(self, in_flight: int = 0) -> None:
        self.peak_bytes = max(self.peak_bytes, self.nbytes + in_flight)
