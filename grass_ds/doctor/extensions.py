# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's C++ extensions: which are compiled, and locks in their folders. Nothing is compiled here.

[Note: Build locks] torch compiles an extension under a file ``lock`` in its folder and removes it afterwards. A build
that was killed leaves it behind, and every later start waits for it for ever, without a message.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding

SHARED_MEMORY = "deepspeed_shm_comm"
"""The extension through which ranks on the CPU communicate; every start loads it."""
LOADING_SECONDS = 20
"""A rank also holds the lock while it loads what is compiled, for less than this."""
STALE_SECONDS = 60
"""A lock that no process holds, in a folder in which nothing has changed for so long, belongs to no build."""


def extensions_root() -> Path:
    """The folder in which torch keeps one folder per compiled extension."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    hip, cuda = torch.version.hip, torch.version.cuda
    build = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root()) / f"{python}_{build}"


def _is_built(name: str) -> bool:
    return (extensions_root() / name / f"{name}.so").exists()


def communication_ready() -> bool:
    """Whether this rank can join a process group without compiling, or waiting for another process that compiles."""
    if get_accelerator().device_name() != "cpu":
        return True
    lock, end = extensions_root() / SHARED_MEMORY / "lock", time.monotonic() + LOADING_SECONDS
    while _is_built(SHARED_MEMORY) and lock.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return _is_built(SHARED_MEMORY) and not lock.exists()


def check_extensions() -> Iterator[Finding]:
    """The extensions that the library uses on this accelerator. Whether they can be compiled is left to ds_report."""
    on_cpu = get_accelerator().device_name() == "cpu"
    for name in (SHARED_MEMORY, "async_io") if on_cpu else ("async_io",):
        text = "not compiled: its first use takes minutes, and `ds_report` says what it lacks"
        yield Finding(name, OK, f"compiled in {extensions_root() / name}" if _is_built(name) else text)


def check_locks() -> Iterator[Finding]:
    """See [Note: Build locks]."""
    locks = sorted(extensions_root().glob("*/lock"))
    for lock in locks:
        seconds = time.time() - max(path.lstat().st_mtime for path in lock.parent.iterdir())
        if _is_held(lock):
            yield Finding("build lock", OK, f"{lock.parent} is being compiled")
        elif seconds < STALE_SECONDS:
            text = f"{lock.parent}: being compiled on another machine, or interrupted just now"
            yield Finding("build lock", WARN, text, "try again in a minute")
        else:
            text = f"no process of yours on this machine holds {lock}, and every start waits for it, without a message"
            remedy = f"unless another machine compiles into this folder: rm {lock}"
            yield Finding("build lock", FAIL, text, remedy)
    if not locks:
        yield Finding("build lock", OK, f"none in {extensions_root()}")


def _is_held(lock: Path) -> bool:
    """Whether a process that this user may inspect has the lock open, as the one that compiles does."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if link.samefile(lock):
                return True
    return False
