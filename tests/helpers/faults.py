# SPDX-License-Identifier: Apache-2.0
"""Disks that fail under an engine, inside a rank: I/O that raises, waits or kills its process; damaged files."""

import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote

from grass_ds.core.units import Unit
from grass_ds.offload import build
from grass_ds.offload.block_io import BlockIO, Piece
from grass_ds.offload.chunks import round_up
from grass_ds.offload.state_files import OffloadError, StateFile

ERRORS = {"disk": OffloadError, "thread": RuntimeError, "memory": MemoryError}


class Faults:
    """What this rank's disk does wrong from :meth:`arm` on: its ``nth`` read or write (``verb``) fails, in the ``way``
    named.

    Ways: a key of :data:`ERRORS`, or ``kill``: the process dies when half of the request is done. ``slow``: seconds
    that every request takes longer, armed or not.
    """

    def __init__(self, verb: str = "", nth: int = 1, way: str = "disk", slow: float = 0.0):
        self.slow, self.count = slow, {"read": 0, "write": 0}
        self._verb, self._left, self._way = verb, nth, way
        self._armed = False
        self._lock = threading.Lock()

    def arm(self) -> None:
        self._armed = True

    def strikes(self, verb: str) -> bool:
        """Whether this request is the one."""
        with self._lock:
            self.count[verb] += 1
            self._left -= self._armed and verb == self._verb
            return self._armed and verb == self._verb and self._left == 0

    def strike(self, verb: str, file: StateFile) -> None:
        if self._way == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ERRORS[self._way](f"{file.path}: {verb} failed: injected")


class FaultyIO(BlockIO):
    """The real thing, but for its faults."""

    def __init__(self, real: BlockIO, faults: Faults):
        self._real, self._faults = real, faults

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        time.sleep(self._faults.slow)
        if self._faults.strikes("read"):
            self._real.read(file, pieces[:1])
            self._faults.strike("read", file)
        self._real.read(file, pieces)

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        time.sleep(self._faults.slow)
        if self._faults.strikes("write"):
            self._real.write(file, pieces[:1])
            self._faults.strike("write", file)
        self._real.write(file, pieces)

    def close(self) -> None:
        self._real.close()


@contextmanager
def faulty_io(faults: Faults) -> Iterator[Faults]:
    """Engines built inside have that disk."""
    real = build.open_io

    def open_io(*args: object) -> object:
        make = real(*args)  # type: ignore[arg-type]
        return lambda: FaultyIO(make(), faults)

    with mock.patch.object(build, "open_io", open_io):
        yield faults


@contextmanager
def file_size_limit(nbytes: int | None) -> Iterator[None]:
    """No file of this process may grow beyond, or be written beyond, that many bytes; None: no change."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft if nbytes is None else nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ---- what a rank says and holds -------------------------------------------------------------------------------------


def said(action: Callable[[], Any]) -> str:
    """``Type: message`` of what the action raised, "" if nothing."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def folder_of(engine: Any) -> Path:
    """Where this rank's state files are."""
    return Path(engine.config["grass"]["offload"]["nvme_path"]) / f"grass_ds_rank{engine.global_rank}"


def state_path(engine: Any, unit: Unit) -> Path:
    """The file of the unit's state on this rank."""
    return folder_of(engine) / f"{quote(unit.name, safe='')}.state"


def held() -> set[str]:
    """State files and locks that this process has open, and its I/O threads."""
    descriptors = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    opened = {os.readlink(fd) for fd in descriptors if fd.is_symlink()}
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("grass")}
    return {name for name in opened if "grass_ds_rank" in name} | threads


# ---- what can be done to a running engine ---------------------------------------------------------------------------


def delete(engine: Any) -> None:
    for path in folder_of(engine).glob("*.state"):
        path.unlink()


def wait_for_transfers(engine: Any) -> None:
    """No file is being read or written."""
    engine.optimizer.store.flush()


def truncate(engine: Any) -> None:
    wait_for_transfers(engine)
    for path in folder_of(engine).glob("*.state"):
        os.truncate(path, path.stat().st_size // 2)


def fill(engine: Any) -> None:
    """Others take all space that is left."""
    with open(folder_of(engine).parent / f"others{engine.global_rank}", "wb", buffering=0) as other:
        while said(lambda: other.write(bytes(64 * 1024))) == "":
            pass


def flip(engine: Any) -> None:
    """One bit of the second moments, in a chunk that only the disk holds: the third of the first layer's five."""
    wait_for_transfers(engine)
    unit = next(unit for unit in engine.optimizer.units if unit.active and not unit.always)
    offset = 2 * round_up(unit.shard_numel) * 4 + 2 * 1024 * 4 + 1234  # of fp32
    with open(state_path(engine, unit), "r+b") as file:
        file.seek(offset)
        [byte] = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 16]))
