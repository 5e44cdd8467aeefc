# SPDX-License-Identifier: Apache-2.0
"""Chunks: the pieces in which optimizer state moves between device, host and disk, and in which it is stepped."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.codecs import Plane
from grass_ds.offload.state_files import ALIGNMENT

# Chunks start at multiples of this many elements. It is a multiple of every vector width and of the blocks of codecs, so
# an element is treated alike in every chunk.
GRAIN = 1024


def round_up(numel: int) -> int:
    """The smallest multiple of :data:`GRAIN` that is at least ``numel``."""
    return -(-numel // GRAIN) * GRAIN


def page_bytes(plane: Plane, elements: int) -> int:
    """Bytes of a stored plane, rounded up to whole pages."""
    return -(-plane.nbytes(elements) // ALIGNMENT) * ALIGNMENT


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
    """How the stored state of units is divided: into planes, see :class:`StateFormat`, and these into chunks."""

    planes: Mapping[tuple[int, torch.dtype], tuple[Plane, ...]]
    """Of the units of a param group and a dtype."""
    chunk_numel: int
    """Most elements of a chunk, a multiple of :data:`GRAIN`."""

    def planes_of(self, unit: Unit) -> tuple[Plane, ...]:
        return self.planes[unit.group, unit.dtype]

    @property
    def capacities(self) -> list[int]:
        """Bytes of the memory, one piece per plane, that any chunk fits into: whole pages."""
        sizes = [[page_bytes(plane, self.chunk_numel) for plane in planes] for planes in self.planes.values()]
        return [max(each) for each in zip_longest(*sizes, fillvalue=0)]

    @property
    def buffer_bytes(self) -> int:
        """Bytes of a buffer that any chunk fits into."""
        return sum(self.capacities)

    def views(self, chunk: Chunk, memory: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The chunk's planes at the beginnings of pieces of memory, each uint8."""
        planes = self.planes_of(chunk.unit)
        return [
            piece[: plane.nbytes(chunk.numel)].view(plane.dtype) for plane, piece in zip(planes, memory, strict=False)
        ]

    def parts(self, chunk: Chunk, stored: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The chunk's part of the planes of its whole unit, as views."""
        planes = self.planes_of(chunk.unit)
        return [plane.of(tensor, chunk.start, chunk.numel) for plane, tensor in zip(planes, stored, strict=True)]

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
