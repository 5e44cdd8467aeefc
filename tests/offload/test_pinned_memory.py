# SPDX-License-Identifier: Apache-2.0
"""Page-locking, with an accelerator that only keeps the books."""

import gc
from collections.abc import Iterator
from unittest import mock

import pytest
from helpers.disks import aio_or_skip

from grass_ds.core import deepspeed_compat
from grass_ds.offload import pinned_memory
from grass_ds.offload.pinned_memory import BufferMemory, HostMemory


class Registry:
    """Registers and unregisters like an accelerator; more than ``limit`` bytes are too many."""

    def __init__(self, limit: int = 2**30):
        self.limit = limit
        self.held: dict[int, int] = {}

    def device_name(self) -> str:
        return "books"

    def current_device_name(self) -> str:
        return "cpu"

    def register_host_memory(self, address: int, nbytes: int) -> bool:
        if sum(self.held.values()) + nbytes > self.limit:
            raise RuntimeError("out of page-locked memory")
        self.held[address] = nbytes
        return True

    def unregister_host_memory(self, address: int) -> None:
        del self.held[address]


@pytest.fixture
def registry() -> Iterator[Registry]:
    books = Registry()
    with (
        mock.patch.object(pinned_memory, "get_accelerator", return_value=books),
        mock.patch.object(deepspeed_compat, "get_accelerator", return_value=books),
    ):
        yield books


def test_pinned_memory_is_exactly_as_large_as_asked(registry: Registry) -> None:
    """Not rounded up to a power of two."""
    part = HostMemory(5_000_004, pin=True)
    assert part.pinned and part.data.nbytes == 5_000_004
    assert registry.held == {part.data.data_ptr(): 5_000_004}
    assert part.data.data_ptr() % 4096 == 0


def test_close_unregisters_once_and_views_stay_readable(registry: Registry) -> None:
    part = HostMemory(8192, pin=True)
    view = part.data.fill_(7)[100:]
    part.close()
    part.close()
    assert registry.held == {}
    assert view.sum().item() == 7 * (8192 - 100)


def test_memory_that_nobody_closed_is_unregistered_when_it_goes(registry: Registry) -> None:
    part = HostMemory(4096, pin=True)
    assert registry.held
    del part
    gc.collect()
    assert registry.held == {}


def test_without_room_for_page_locks_memory_is_pageable(registry: Registry) -> None:
    registry.limit = 10_000
    parts = [HostMemory(8192, pin=True) for _ in range(2)]
    assert [part.pinned for part in parts] == [True, False]
    assert parts[1].data.fill_(3).sum().item() == 3 * 8192
    for part in parts:
        part.close()
    assert registry.held == {}


def test_unpinned_memory_is_not_registered(registry: Registry) -> None:
    assert not HostMemory(4096, pin=False).pinned
    assert registry.held == {}


def test_buffer_memory_is_pinned_and_released(registry: Registry) -> None:
    memory = BufferMemory(3, 8192, pin=True, lock=True)
    assert memory.locked and sorted(registry.held.values()) == [8192] * 3
    memory.close()
    assert registry.held == {}


def test_buffer_memory_says_when_not_all_of_it_is_locked(registry: Registry) -> None:
    registry.limit = 2 * 8192
    assert not BufferMemory(3, 8192, pin=True, lock=True).locked


def test_locked_memory_does_not_show_what_was_in_the_heap() -> None:
    """Its end goes to files, where the pattern of a failed read would be taken for another failed read."""
    aio_or_skip()
    for _ in range(20):
        memory = BufferMemory(3, 8192, pin=False, lock=True)
        assert memory.locked
        assert not any(buffer.any() for buffer in memory.buffers)
        for buffer in memory.buffers:
            buffer.fill_(255)
