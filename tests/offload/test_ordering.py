# SPDX-License-Identifier: Apache-2.0
"""Waits between compute, copies and disk: with all of them the store is exact, and without any one of them it is not.

The device is played by ``helpers.lazy_streams``, which puts every copy off as long as it is allowed to. What is
removed in a mutation is one kind of wait; that it then goes wrong shows that the wait is needed, and that these tests
would notice its loss.
"""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.disks import aio_or_skip
from helpers.lazy_streams import Event, LazyCopies
from helpers.state_rig import Rig, SlowIO, rig_of

from grass_ds.offload.block_io import BlockIO
from grass_ds.offload.copies import Copies
from grass_ds.offload.store import UnitState

pytestmark = pytest.mark.timeout(120)

GRAIN = 1  # the smallest chunk there is: 1024 elements
NVME = {"device": "nvme", "io": "posix", "chunk_numel": GRAIN}
CASES: dict[str, dict[str, Any]] = {
    "none": {"device": "none"},
    "cpu-stream": {"device": "cpu", "chunk_numel": GRAIN},
    "cpu-stream-one-buffer": {"device": "cpu", "chunk_numel": 1500, "device_buffers": 1},
    "cpu-stream-three-buffers": {"device": "cpu", "chunk_numel": 1500, "device_buffers": 3},
    "cpu-stream-late": {"device": "cpu", "chunk_numel": GRAIN, "prefetch": "step"},
    "cpu-period": {"device": "cpu", "residency": "period", "chunk_numel": GRAIN},
    "nvme-stream": NVME,
    "nvme-stream-through-files": {**NVME, "host_buffers": 4, "checksum": True},
    "nvme-stream-through-files-three-buffers": {**NVME, "host_buffers": 5, "device_buffers": 3},
    "nvme-stream-one-buffer-late": {**NVME, "host_buffers": 3, "device_buffers": 1, "prefetch": "step"},
    "nvme-period": {**NVME, "residency": "period", "host_buffers": 4, "checksum": True},
    "nvme-stream-aio": {**NVME, "io": "aio", "host_buffers": 5, "chunk_numel": 1500, "checksum": True},
    "nvme-period-aio": {**NVME, "io": "aio", "residency": "period", "chunk_numel": 10**6},
    "none-exact": {"device": "none", "state_format": "exact", "chunk_numel": GRAIN},
    "cpu-stream-exact": {"device": "cpu", "chunk_numel": 1500, "state_format": "exact"},
    "cpu-period-exact": {"device": "cpu", "residency": "period", "chunk_numel": GRAIN, "state_format": "exact"},
    "nvme-stream-exact": {**NVME, "host_buffers": 4, "checksum": True, "state_format": "exact"},
}


@contextmanager
def frequent_switches() -> Iterator[None]:
    """Threads take turns a hundred times more often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


class SlowCopies(Copies):
    """Copies that pause between planes."""

    def _copy(self, pairs: Any, after: Sequence[Any], lane: str, name: str) -> Any:
        def paused() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for pair in pairs:
                yield pair
                time.sleep(1e-4)

        return super()._copy(paused(), after, lane, name)


# ---- with every wait ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copies",
    [
        pytest.param(Copies, id="synchronous", marks=pytest.mark.all),
        pytest.param(SlowCopies, id="slow", marks=pytest.mark.all),
        pytest.param(LazyCopies, id="lazy"),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_random_steps_switches_and_settings_give_what_plain_tensors_give(
    case: str, copies: type[Copies], tmp_path: Path
) -> None:
    if "aio" in case:
        aio_or_skip()
    torn: list[str] = []
    for seed, seconds in enumerate((0.0, 0.002, 0.0)):
        wrap = partial(SlowIO, seconds=seconds, torn=torn)
        with frequent_switches(), rig_of(CASES[case], tmp_path, seed, copies=copies, wrap_io=wrap) as rig:
            rig.play(periods=8)
    assert torn == []  # nothing changed while it was written


# ---- without one of them --------------------------------------------------------------------------------------------


def caller() -> str:
    """Name of the thread that asks."""
    return threading.current_thread().name


class NoJoin(LazyCopies):
    def compute_waits(self, event: Event) -> bool:
        return False


class NoAfter(LazyCopies):
    lane = ""

    def copy_waits(self, lane: str, event: Event) -> bool:
        return lane != self.lane or event.lane is None


class LoadsNotAfterCopies(NoAfter):
    lane = "load"


class StoresNotAfterCopies(NoAfter):
    lane = "store"


class CopiesNotAfterCompute(LazyCopies):
    def copy_waits(self, lane: str, event: Event) -> bool:
        return event.lane is not None


class NoSynchronize(LazyCopies):
    thread = ""

    def host_waits(self, event: Event) -> bool:
        return caller() != self.thread


class MainDoesNotSynchronize(NoSynchronize):
    thread = "MainThread"


class WriterDoesNotSynchronize(NoSynchronize):
    thread = "grass-write"


class ReaderDoesNotSynchronize(NoSynchronize):
    thread = "grass-read"


# what is removed -> (copies, case that shall notice)
MUTATIONS: dict[str, tuple[type[LazyCopies], str]] = {
    "compute does not wait for loads": (NoJoin, "cpu-stream"),
    "loads do not wait for stores": (LoadsNotAfterCopies, "cpu-stream"),
    "loads do not wait for stores, through host buffers": (LoadsNotAfterCopies, "nvme-stream"),
    "stores do not wait for loads": (StoresNotAfterCopies, "nvme-stream-through-files-three-buffers"),
    "copies do not wait for compute": (CopiesNotAfterCompute, "cpu-stream"),
    "the host tier does not wait for stores": (MainDoesNotSynchronize, "cpu-stream"),
    "a file is written before its buffer": (WriterDoesNotSynchronize, "nvme-stream-through-files"),
    "a buffer is read into before it has been copied": (ReaderDoesNotSynchronize, "nvme-stream-through-files"),
}
ATTEMPTS = 40


def goes_wrong(case: str, seed: int, folder: Path, copies: type[Copies]) -> bool:
    try:
        with rig_of(CASES[case], folder, seed, copies=copies, wrap_io=partial(SlowIO, seconds=0.0)) as rig:
            rig.play(periods=8)
    except Exception:  # a difference, or an error: a checksum that does not fit
        return True
    return False


@pytest.mark.parametrize("removed", MUTATIONS)
def test_a_removed_wait_is_noticed(removed: str, tmp_path: Path) -> None:
    copies, case = MUTATIONS[removed]
    assert any(goes_wrong(case, seed, tmp_path, copies) for seed in range(ATTEMPTS)), "nothing went wrong"


# ---- races that were there ------------------------------------------------------------------------------------------


class Gate:
    """Holds transfers of one kind until it is opened: reads when they are done, writes before they begin."""

    def __init__(self, verb: str):
        self._verb = verb
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def around(self, inner: BlockIO) -> BlockIO:
        stock = getattr(inner, self._verb)

        def held(*arguments: Any) -> None:
            if self._verb == "read":
                stock(*arguments)
            self.reached.set()
            assert self.open.wait(30)
            if self._verb == "write":
                stock(*arguments)

        setattr(inner, self._verb, held)
        return inner

    def close_until_later(self, seconds: float = 0.2) -> None:
        self.reached.clear()
        self.open.clear()
        threading.Timer(seconds, self.open.set).start()


FEW = {**NVME, "device_buffers": 1, "host_buffers": 3, "checksum": True}


def stored(rig: Rig) -> tuple[Any, torch.Tensor]:
    """A unit of several chunks whose state is in its file and nowhere else."""
    unit, other = (u for u in rig.units if u.shard_numel > 3 * 1024 and u.layer in (0, 1))
    state = torch.arange(unit.shard_numel, dtype=torch.float32)
    rig.store.put(unit, UnitState(state))
    rig.store.put(other, UnitState(torch.zeros(other.shard_numel)))
    rig.store.flush()
    return unit, state


def test_what_is_put_while_the_old_state_is_read_ahead_remains(tmp_path: Path) -> None:
    gate = Gate("read")
    with rig_of(FEW, tmp_path, 0, wrap_io=gate.around) as rig:
        unit, state = stored(rig)
        gate.close_until_later()
        rig.store.plan([unit])
        assert gate.reached.wait(10)
        rig.store.put(unit, UnitState(state + 1))
        assert torch.equal(rig.store[unit].master, state + 1)
        rig.store.flush()
        assert torch.equal(rig.store[unit].master, state + 1)


def test_a_file_may_be_read_after_its_state_was_dropped_while_it_was_written(tmp_path: Path) -> None:
    gate = Gate("write")
    with rig_of(FEW, tmp_path, 0, wrap_io=gate.around) as rig:
        unit, state = stored(rig)
        rig.store.plan([unit])
        gate.close_until_later()
        rig.store.put(unit, UnitState(state + 1))
        assert gate.reached.wait(10)
        rig.store.drop(unit)
        rig.store.put(unit, UnitState(state + 2))
        rig.store.plan([unit])
        assert torch.equal(rig.store[unit].master, state + 2)
        rig.store.flush()


def test_a_load_waits_for_a_store_that_is_queued(tmp_path: Path) -> None:
    """A store is queued while the chunk's buffer is written: that buffer holds the state before it."""
    gate = Gate("write")
    with rig_of(FEW, tmp_path, 0, wrap_io=gate.around) as rig:
        unit, _ = stored(rig)
        tier: Any = rig.store._tier
        chunk = rig.store.chunks(unit)[0]
        first, second, target = ([torch.full((chunk.numel,), value)] * 3 for value in (1.0, 2.0, 0.0))
        gate.close_until_later()
        tier.store(chunk, first, ())
        assert gate.reached.wait(10)
        tier.store(chunk, second, ())
        tier.load(chunk, target, ()).result()
        assert torch.equal(target[0], second[0])


def test_a_buffer_remembers_a_copy_that_another_thread_issued(tmp_path: Path) -> None:
    """A chunk is read while it is copied to the device: its buffer must not be reused before the copy is over."""
    reading, loading = threading.Event(), threading.Event()

    class Load(LazyCopies):
        def load(self, *arguments: Any) -> Any:
            loading.set()
            reading.wait(0.2)
            return super().load(*arguments)

    class Read(Copies):
        def load(self, *arguments: Any) -> Any:
            reading.set()
            wait([transfer], 0.2)
            return super().load(*arguments)

    with rig_of(FEW, tmp_path, 0, copies=Load) as rig:
        unit, state = stored(rig)
        tier: Any = rig.store._tier
        tier._host_copies = Read(rig.store.trace)
        chunk = rig.store.chunks(unit)[0]
        target = [torch.zeros(chunk.numel) for _ in range(3)]
        transfer = tier.load(chunk, target, [tier._copies.compute_event()])
        assert loading.wait(10)
        tier.read(unit)
        tier.read(next(u for u in rig.units if u is not unit and u in rig.store))
        tier._copies.run(transfer.result())
        assert torch.equal(target[0], chunk.of(state))


@pytest.mark.parametrize("case", ["none", "cpu-stream", "cpu-period", "nvme-stream"])
def test_a_step_that_raises_leaves_the_state_as_it_was(case: str, tmp_path: Path) -> None:
    """``none`` has no other copy than the one in the buffer."""
    with rig_of(CASES[case], tmp_path, 0) as rig:
        rig.play(periods=3)
        unit = next(unit for unit in rig.active if unit in rig.store)
        chunk = rig.store.chunks(unit)[0]
        with pytest.raises(ZeroDivisionError), rig.store.on_device(chunk, torch.optim.AdamW([torch.zeros(1)]), 1):
            raise ZeroDivisionError
        rig.check()
        rig.play(periods=3)
