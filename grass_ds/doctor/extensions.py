# SPDX-License-Identifier: Apache-2.0
"""DeepSpeed's C++ extensions: compiled, to be compiled when first used, or impossible. Nothing is compiled here.

[Note: Build locks] torch compiles an extension under a file ``lock`` in its folder and removes it afterwards. A build
that was killed leaves it behind, and every later start waits for it for ever, without a message.
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

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding

SHARED_MEMORY = "deepspeed_shm_comm"
"""The extension through which ranks on the CPU communicate; every start loads it."""
OPS = (
    (SHARED_MEMORY, FAIL, "apt-get install g++ or module load gcc; pip install ninja, and activate its environment"),
    ("async_io", WARN, 'the same; grass.offload.io = "auto" uses posix without it'),
)
"""Name, status where it is impossible, remedy."""
STALE_SECONDS = 600
"""A lock in a folder in which nothing has changed for so long belongs to no build."""


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
    cpu = get_accelerator().device_name() == "cpu"
    for name, status, remedy in OPS if cpu else OPS[1:]:
        # ninja is run even when there is nothing left to compile.
        tools = ["ninja"] if is_built(name) else ["ninja", cpp_extension.get_cxx_compiler()]
        missing = [tool for tool in tools if not shutil.which(tool)]
        if missing:
            yield Finding(name, status, f"not in PATH: {', '.join(missing)}", remedy)
        elif is_built(name):
            yield Finding(name, OK, f"compiled in {extensions_root() / name}")
        else:
            yield Finding(
                name, OK, "will be compiled when it is first used, in a few minutes; `ds_report` shows if it can"
            )


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
