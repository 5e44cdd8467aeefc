# SPDX-License-Identifier: Apache-2.0
"""Chunks: the pieces in which optimizer state moves between device, host and disk, and in which it is stepped."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from grass_ds.core.units import Unit

ELEMENT = 4  # bytes: all state is fp32
# Chunks start at multiples of this many elements: 4 KiB of fp32, which direct I/O needs. It is a multiple of every
# vector width, so vectorised optimizers treat an element alike in every chunk.
GRAIN = 1024


def round_up(numel: int) -> int:
    """The smallest multiple of :data:`GRAIN` that is at least ``numel``."""
    return -(-numel // GRAIN) * GRAIN


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


@dataclass(frozen=True)
class StateLayout:
    """How the state of units is divided: into planes (fp32 master weights, moments), and these into chunks."""

    planes: tuple[int, ...]
    """Number of planes, per param group."""
    chunk_numel: int
    """Most elements of a chunk, a multiple of :data:`GRAIN`."""

    @property
    def max_planes(self) -> int:
        return max(self.planes)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a buffer that any chunk fits into."""
        return self.max_planes * self.chunk_numel * ELEMENT

    def planes_of(self, unit: Unit) -> int:
        return self.planes[unit.group]

    def chunks(self, unit: Unit) -> list[Chunk]:
        """The unit's shard in order."""
        end, step = unit.shard_numel, self.chunk_numel
        return [Chunk(unit, start, min(step, end - start), start + step >= end) for start in range(0, end, step)]

    def largest_active_set(self, units: Iterable[Unit], num_active_layers: int, share: float = 1.0) -> int:
        """Most chunks that train at a time: always-active units and the ``num_active_layers`` largest layers.

        Args:
            share: the largest of all layers' elements that these have; below 1 where every layer is one unit.
        """
        counts, elements = Counter[int | None](), 0
        for unit in units:
            if unit.ever_active:
                counts[None if unit.always else unit.layer] += len(self.chunks(unit))
                elements += 0 if unit.always else unit.shard_numel
        always, largest = counts.pop(None, 0), sum(count for _, count in counts.most_common(num_active_layers))
        if share < 1.0:  # one incomplete chunk per unit
            largest = min(largest, int(share * elements / self.chunk_numel) + num_active_layers)
        return always + largest
