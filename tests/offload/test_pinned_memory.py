# SPDX-License-Identifier: Apache-2.0
"""Page-locking, with an accelerator that only keeps the books."""

import gc
from collections.abc import Iterator
from unittest import mock

import pytest
from helpers.disks import aio_or_skip, run_python

from grass_ds.core import deepspeed_compat
from grass_ds.offload import pinned_memory
from grass_ds.offload.pinned_memory import HostMemory


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


def test_pinned_memory_is_exactly_as_large_as_asked_and_close_unregisters_it_once(registry: Registry) -> None:
    """Not rounded up to a power of two; views stay readable."""
    memory = HostMemory(5_000_004, pin=True, lock=True)
    assert memory.locked and memory.data.nbytes == 5_000_004 and memory.data.data_ptr() % 4096 == 0
    assert registry.held == {memory.data.data_ptr(): 5_000_004}
    view = memory.data.fill_(7)[100:]
    memory.close()
    memory.close()
    assert registry.held == {}
    assert view.sum().item() == 7 * (5_000_004 - 100)


def test_memory_that_nobody_closed_is_unregistered_when_it_goes(registry: Registry) -> None:
    memory = HostMemory(4096, pin=True)
    assert registry.held
    del memory
    gc.collect()
    assert registry.held == {}


def test_memory_is_pageable_where_it_cannot_or_shall_not_be_pinned(registry: Registry) -> None:
    registry.limit = 10_000
    memories = [HostMemory(8192, pin=True), HostMemory(8192, pin=True), HostMemory(4096, pin=False)]
    assert [memory.locked for memory in memories] == [True, False, False]
    assert memories[1].data.fill_(3).sum().item() == 3 * 8192
    for memory in memories:
        memory.close()
    assert registry.held == {}


def test_locked_memory_does_not_show_what_was_in_the_heap() -> None:
    """Its end goes to files, where the pattern of a failed read would be taken for another failed read."""
    aio_or_skip()
    for _ in range(20):
        memory = HostMemory(3 * 8192, pin=False, lock=True)
        assert memory.locked and memory.data.data_ptr() % 4096 == 0
        assert not memory.data.any()
        memory.data.fill_(255)


def test_the_limit_of_locked_memory_is_respected_and_memory_given_back() -> None:
    """Beyond the limit, DeepSpeed would abort."""
    aio_or_skip()
    source = """
import os, resource
from deepspeed.utils.pin_memory import get_native_pinned_memory
from grass_ds.offload.pinned_memory import HostMemory

def locked_kib():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmLck"))

get_native_pinned_memory()
resource.setrlimit(resource.RLIMIT_MEMLOCK, (2**20, 2**20))
if os.getuid() == 0:
    os.setuid(65534)  # root is above limits
for _ in range(4):  # fits only if it is given back each time
    memory = HostMemory(3 * 2**18, pin=False, lock=True)
    assert memory.locked and locked_kib() >= 3 * 2**8
    assert not HostMemory(2 * 2**18, pin=False, lock=True).locked
    view = memory.data[4096:]
    memory.close()
    view.fill_(1)
    del view
    assert locked_kib() == 0, locked_kib()
assert not HostMemory(2**21, pin=False, lock=True).locked
"""
    run_python(source)
