# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's C++ extensions: compiled, to be compiled at the first use, or not possible. Nothing is compiled here.

[Note: Locks of torch's builds] torch compiles an extension under a file ``lock`` in its folder and removes it afterwards. A build that
was killed leaves it behind, and every later start waits for it for ever, without a word.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from grass_ds.core import deepspeed_compat
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding

SHARED_MEMORY = "deepspeed_shm_comm"
"""What ranks on the CPU talk through; every start loads it."""
LOCK_SECONDS = 60
_COMPILER = "install a C++ compiler (apt-get install g++, module load gcc)"
_NINJA = "activate the virtual environment, whose bin folder has to be in PATH, or pip install ninja"


def extensions_root() -> Path:
    """The folder of torch's compiled extensions, one folder in it for each."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    hip, cuda = torch.version.hip, torch.version.cuda
    build = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root()) / f"{python}_{build}"


def is_built(name: str) -> bool:
    """Whether the extension ``name`` has been compiled."""
    return (extensions_root() / name / f"{name}.so").exists()


def communication_ready() -> bool:
    """Whether a process group can be joined without compiling, or waiting for it."""
    locked = (extensions_root() / SHARED_MEMORY / "lock").exists()
    return get_accelerator().device_name() != "cpu" or (is_built(SHARED_MEMORY) and not locked)


def check_extensions() -> Iterator[Finding]:
    """The compiler, and the extensions that training may load."""
    cpu = get_accelerator().device_name() == "cpu"
    name = cpp_extension.get_cxx_compiler()
    compiler, ninja = shutil.which(name), cpp_extension.is_ninja_available()
    needed = cpu and not is_built(SHARED_MEMORY)
    if compiler:
        yield Finding("compiler", OK, compiler)
    else:
        yield Finding("compiler", FAIL if needed else WARN, f"no {name} in PATH", _COMPILER)
    if not ninja:
        # It is run even when there is nothing left to compile.
        yield Finding("ninja", FAIL if cpu else WARN, "not in PATH", _NINJA)
    if cpu:
        yield _state(SHARED_MEMORY, None if compiler and ninja else "see above", FAIL, "")
    yield _state(
        "async_io", _async_io_obstacle(bool(compiler and ninja)), WARN, 'or leave it: grass.offload.io = "posix" works'
    )


def check_locks(root: Path) -> Iterator[Finding]:
    """See [Note: Locks of torch's builds]."""
    locks = sorted(root.glob("*/lock"))
    for lock in locks:
        idle = time.time() - max(path.lstat().st_mtime for path in lock.parent.iterdir())
        if holder := _holder(lock):
            yield Finding("build lock", OK, f"{lock.parent} is being compiled by process {holder}")
        elif idle < LOCK_SECONDS:
            yield Finding(
                "build lock",
                WARN,
                f"{lock.parent}: being compiled elsewhere, or interrupted just now",
                "try again in a minute",
            )
        else:
            yield Finding(
                "build lock",
                FAIL,
                f"{lock} is held by no process of yours on this machine, and nothing has changed there for {idle / 60:.0f} minutes. "
                "Every start waits for it, silently and for ever",
                f"unless another machine is compiling into this folder: rm {lock}",
            )
    if not locks:
        yield Finding("build lock", OK, f"none in {root}")


def _state(name: str, obstacle: str | None, status: str, remedy: str) -> Finding:
    if is_built(name):
        return Finding(name, OK, f"compiled in {extensions_root() / name}")
    if obstacle is None:
        return Finding(name, OK, "will be compiled when it is first used, which takes a few minutes")
    return Finding(name, status, f"cannot be compiled: {obstacle}", remedy)


def _async_io_obstacle(can_compile: bool) -> str | None:
    if not can_compile:
        return "no compiler or no ninja"
    if get_accelerator().device_name() == "cuda" and cpp_extension.CUDA_HOME is None and torch.version.cuda:
        return "no CUDA toolkit (set CUDA_HOME, module load cuda)"
    if deepspeed_compat.get_native_pinned_memory is None:
        return "this DeepSpeed has no page-locked memory that all AIO handles know (pip install 'deepspeed>=0.19.6,<0.20')"
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    if builder is None or not builder.is_compatible(verbose=False):
        return "libaio or its header is missing (apt-get install libaio-dev)"
    return None


def _holder(lock: Path) -> int | None:
    """The process that has the lock open, as the one that compiles does; of those that this user may look into."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.path.samestat(link.stat(), lock.stat()):
                return int(link.parts[2])
        except OSError:
            continue
    return None
