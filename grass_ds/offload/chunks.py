# SPDX-License-Identifier: Apache-2.0
"""Chunks: the grain at which optimizer state crosses between device, host and disk, and at which it is stepped.

A unit can be as large as the head of a 128k vocabulary; a chunk is as large as the device window allows, whatever the unit.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from grass_ds.core.units import Unit

ELEMENT = 4  # bytes: all state is fp32
# Chunks start at multiples of this many elements: 4 KiB of fp32, which direct I/O wants, and a multiple of every vector width, so that
# vectorised optimizers treat an element alike in whichever chunk it is and results do not depend on the chunk size.
GRAIN = 1024


def round_up(numel: int, grain: int = GRAIN) -> int:
    """The smallest multiple of ``grain`` that is not below ``numel``."""
    return -(-numel // grain) * grain


@dataclass(frozen=True)
class Chunk:
    """Elements ``start`` to ``start + numel`` of this rank's shard of a unit; ``last``: the unit ends with it."""

    unit: Unit
    start: int
    numel: int
    last: bool

    def of(self, shard: torch.Tensor) -> torch.Tensor:
        """This chunk's part of a [shard_numel] tensor, as a view."""
        return shard.narrow(0, self.start, self.numel)

    def __str__(self) -> str:
        return f"{self.unit.name}[{self.start}:{self.start + self.numel}]"


def chunks_of(unit: Unit, chunk_numel: int) -> list[Chunk]:
    """The unit's shard in order, in pieces of at most ``chunk_numel`` elements (a multiple of :data:`GRAIN`)."""
    total = unit.shard_numel
    starts = range(0, total, chunk_numel)
    return [Chunk(unit, start, min(chunk_numel, total - start), last=start + chunk_numel >= total) for start in starts]


def largest_active_set(units: Iterable[Unit], num_active_layers: int, chunk_numel: int) -> int:
    """Chunks of the largest set that can train at a time: the always-active units and the ``num_active_layers`` largest layers."""
    always, layers = 0, dict[int, int]()
    for unit in units:
        count = -(-unit.shard_numel // chunk_numel)
        if unit.always:
            always += count
        elif unit.layer is not None:
            layers[unit.layer] = layers.get(unit.layer, 0) + count
    return always + sum(sorted(layers.values(), reverse=True)[:num_active_layers])


def effective_chunk_numel(asked: int, units: Sequence[Unit]) -> int:
    """``asked`` rounded up to :data:`GRAIN`, but not above the largest shard that can ever train: buffers are of this size."""
    largest = max((u.shard_numel for u in units if u.ever_active), default=GRAIN)
    return min(round_up(asked), round_up(largest))
