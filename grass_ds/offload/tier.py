# SPDX-License-Identifier: Apache-2.0
"""What lies below the device buffers: the interface of the host and the NVMe tier.

[Note: Futures and events] A copy has two ends. The host only waits until it has been *issued*, perhaps by an I/O
thread that must read a file first: that is the :class:`~concurrent.futures.Future`. Streams wait until it is *over*:
that is the device event, the future's result.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk

Planes = list[torch.Tensor]
"""The stored state of a chunk or a unit, see :class:`StateFormat`."""

Transfer = Future[Any]
"""A copy between a tier and the device; its result is the event that it ends with, None for a synchronous copy."""


def issued(event: Any) -> Transfer:
    """A copy that has been issued already."""
    transfer: Transfer = Future()
    transfer.set_result(event)
    return transfer


class Tier:
    """Keeps state that is not on the device; this class keeps nothing, for ``device: none``.

    Copies are ordered by the events that they take and return.

    Attributes:
        error: what failed in a thread of the tier; from then on no state can be relied upon.
        host_bytes, nvme_bytes: memory and disk held.
    """

    error: BaseException | None = None
    host_bytes = nvme_bytes = 0

    def load(self, chunk: Chunk, target: Planes, after: Sequence[Any]) -> Transfer:
        """Copy the chunk to ``target`` (device) after the events of ``after``. It must have been stored before."""
        raise NotImplementedError

    def store(self, chunk: Chunk, source: Planes, after: Sequence[Any]) -> Transfer:
        """Copy the chunk from ``source`` (device) after the events of ``after``."""
        raise NotImplementedError

    def plan(self, chunks: Sequence[Chunk]) -> None:
        """The coming steps use these chunks and no others."""

    def read_ahead(self, chunks: Iterable[Chunk]) -> None:
        """These chunks will be loaded next, in this order: read as many into host memory as there is room for."""

    def read(self, unit: Unit) -> Planes:
        """The unit's state in host memory, read-only; blocks until it is there."""
        raise NotImplementedError

    def write(self, unit: Unit, planes: Planes) -> None:
        """Set the unit's state from tensors on any device; blocks until it can be read."""
        raise NotImplementedError

    def drop(self, unit: Unit) -> None:
        """Delete the unit's state."""

    def flush(self) -> None:
        """Block until no transfer is under way and everything stored is where it is kept; raise what failed."""

    def close(self) -> None:
        """Release memory, threads and files. Idempotent."""
