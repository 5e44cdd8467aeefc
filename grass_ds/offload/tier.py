# SPDX-License-Identifier: Apache-2.0
"""What lies below the device window: the interface of the host and the NVMe tier."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.chunks import Chunk

Planes = list[torch.Tensor]
"""A chunk's or a unit's state: fp32 master weights, then the moments in the optimizer's order; all of one length."""


class Ticket:
    """A copy between a tier and the device that was asked for, perhaps of a thread.

    ``wait`` blocks the host until the copy has been *issued* and returns the device event that it ends with (None where copies
    are synchronous); it raises what went wrong in the thread.
    """

    def __init__(self) -> None:
        self._settled = threading.Event()
        self._event: Any = None
        self._error: BaseException | None = None

    @classmethod
    def issued(cls, event: Any) -> "Ticket":
        """A ticket of a copy that has been issued already."""
        ticket = cls()
        ticket.settle(event)
        return ticket

    def settle(self, event: Any = None, error: BaseException | None = None) -> None:
        """Called once, by whoever did the work."""
        self._event, self._error = event, error
        self._settled.set()

    @property
    def settled(self) -> bool:
        return self._settled.is_set()

    def wait(self) -> Any:
        self._settled.wait()
        if self._error is not None:
            raise self._error
        return self._event


class Tier(Protocol):
    """Where state rests below the device window. Copies are ordered by the events they are given and those they return."""

    error: BaseException | None
    """What went wrong in a thread of the tier; from then on nothing can be relied upon."""

    def load(self, chunk: Chunk, target: Planes, after: Sequence[Any]) -> Ticket:
        """Copy the chunk to ``target`` (device) when the events of ``after`` have passed. It must have been stored before."""

    def store(self, chunk: Chunk, source: Planes, after: Sequence[Any]) -> Ticket:
        """Copy the chunk from ``source`` (device) when the events of ``after`` have passed."""

    def expect(self, chunks: Sequence[Chunk]) -> None:
        """The coming steps use these chunks and no others."""

    def read_ahead(self, chunks: Iterable[Chunk]) -> None:
        """These will be loaded next, in this order: get hold of as many as there is room for."""

    def fetch(self, unit: Unit) -> Planes:
        """The unit's state in host memory, each plane [shard_numel], read-only; blocks until it is there."""

    def place(self, unit: Unit, planes: Planes) -> None:
        """Set the unit's state from tensors on any device, each [shard_numel]; blocks until it can be fetched."""

    def drop(self, unit: Unit) -> None:
        """Forget the unit."""

    def flush(self) -> None:
        """Block until everything stored is where it rests; raise what went wrong."""

    def close(self) -> None:
        """Release memory, threads and files. Idempotent."""

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory held."""

    @property
    def nvme_bytes(self) -> int:
        """Bytes of disk held."""
