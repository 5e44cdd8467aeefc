# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's C++ extensions: compiled, to be compiled when first used, or impossible. Nothing is compiled here.

[Note: Build locks] torch compiles an extension under a file ``lock`` in its folder and removes it afterwards. A build that was killed
leaves it behind, and every later start waits for it for ever, without a message.
"""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from grass_ds.core import deepspeed_compat
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding

SHARED_MEMORY = "deepspeed_shm_comm"
"""The extension through which ranks on the CPU communicate; every start loads it."""
STALE_SECONDS = 600
"""A lock in a folder in which nothing has changed for so long belongs to no build."""
_REMEDY = {
    SHARED_MEMORY: "apt-get install g++ or module load gcc; pip install ninja in an environment that is active",
    "async_io": 'for grass.offload.io = "aio": `ds_report` shows what is missing; "auto" uses posix without it',
}


def extensions_root() -> Path:
    """The folder in which torch keeps one folder per compiled extension."""
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    hip, cuda = torch.version.hip, torch.version.cuda
    build = f"rocm{hip.replace('.', '')}" if hip else f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    python = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
    return Path(cpp_extension.get_default_build_root()) / f"{python}_{build}"


def is_built(name: str) -> bool:
    """Whether the extension ``name`` is compiled."""
    return (extensions_root() / name / f"{name}.so").exists()


def communication_ready() -> bool:
    """Whether this rank can join a process group without compiling, or waiting for another process that compiles."""
    locked = (extensions_root() / SHARED_MEMORY / "lock").exists()
    return get_accelerator().device_name() != "cpu" or (is_built(SHARED_MEMORY) and not locked)


def check_extensions() -> Iterator[Finding]:
    """The extensions that the library uses on this accelerator."""
    accelerator = get_accelerator()
    needed = {"ShareMemCommBuilder": FAIL} if accelerator.device_name() == "cpu" else {}
    for builder_name, status in {**needed, "AsyncIOBuilder": WARN}.items():
        builder = accelerator.create_op_builder(builder_name)
        obstacle = _obstacle(builder)
        if obstacle:
            yield Finding(builder.name, status, obstacle, _REMEDY[builder.name])
        elif is_built(builder.name):
            yield Finding(builder.name, OK, f"compiled in {extensions_root() / builder.name}")
        else:
            yield Finding(builder.name, OK, "will be compiled when it is first used, which takes a few minutes")


def _obstacle(builder: Any) -> str:
    """Why the extension cannot be loaded; empty if it can."""
    if not cpp_extension.is_ninja_available():
        return "ninja is not in PATH, and is run even when there is nothing left to compile"
    if builder.name == "async_io" and deepspeed_compat.get_native_pinned_memory is None:
        return "needs DeepSpeed >= 0.19.6"
    if is_built(builder.name):
        return ""
    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler):
        return f"cannot be compiled: {compiler} is not in PATH"
    if get_accelerator().device_name() == "cuda" and torch.version.cuda and cpp_extension.CUDA_HOME is None:
        return "cannot be compiled: no CUDA toolkit (set CUDA_HOME, module load cuda)"
    return "" if builder.is_compatible(verbose=False) else "cannot be compiled"


def check_locks(root: Path) -> Iterator[Finding]:
    """See [Note: Build locks]."""
    locks = sorted(root.glob("*/lock"))
    for lock in locks:
        minutes = (time.time() - max(path.lstat().st_mtime for path in lock.parent.iterdir())) / 60
        text = f"{lock}: nothing has changed there for {minutes:.0f} minutes, and every start waits while it exists"
        stale = minutes * 60 >= STALE_SECONDS
        remedy = f"rm {lock}" if stale else f"wait; if nothing is being compiled: rm {lock}"
        yield Finding("build lock", FAIL if stale else WARN, text, remedy)
    if not locks:
        yield Finding("build lock", OK, f"none in {root}")
