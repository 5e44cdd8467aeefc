# SPDX-License-Identifier: Apache-2.0
"""The folder for optimizer state on a local disk, and the folder that all machines share."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import deepspeed.comm as dist
import torch

from grass_ds.core.agreement import gather_from_ranks
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding
from grass_ds.offload.block_io import AioSettings, Piece, PosixIO
from grass_ds.offload.pinned_memory import HostMemory
from grass_ds.offload.state_files import IN_MEMORY, StateFile, StateFiles, filesystem, resolve_path

TEST_BYTES = 256 * 2**20
NETWORK = ("nfs", "nfs4", "cifs", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs", "9p")
SHARED_SECONDS = 30.0
"""How long a new file may take to appear on another machine: NFS looks at a folder again after at most 30 seconds."""


def check_nvme(path: str) -> Iterator[Finding]:
    """Space, filesystem and speed of the folder for ``grass.offload.nvme_path``; raises what training would raise."""
    root = resolve_path(path)
    with (
        tempfile.TemporaryDirectory(dir=root, prefix="grass_ds_doctor_") as folder,
        closing(StateFiles(Path(folder), 0, "doctor", {"speed": TEST_BYTES})) as files,
    ):
        written, read = _measure(files["speed"])
        direct = files.direct
    kind, free = filesystem(root), shutil.disk_usage(root).free / 1e9
    text = f"{root} ({kind}): {free:.0f} GB free, writes {written:.0f} MB/s, reads {read:.0f} MB/s"
    drawbacks = {
        "it takes host memory": kind in IN_MEMORY,
        "all machines share its speed": kind in NETWORK,
        "no direct I/O": not direct,
    }
    if any(drawbacks.values()):
        text = "; ".join([text, *(drawback for drawback, applies in drawbacks.items() if applies)])
        yield Finding("nvme_path", WARN, text, "choose a local disk with ext4 or xfs")
    else:
        yield Finding("nvme_path", OK, text)


def _measure(file: StateFile) -> tuple[float, float]:
    """Speed of writing and of reading, MB/s."""
    memory = HostMemory(TEST_BYTES, pin=False)
    memory.data.view(torch.int64).random_()  # some disks compress
    pieces = [Piece(memory.data, 0)]
    with closing(PosixIO(AioSettings.parse({}))) as io:
        start = time.perf_counter()
        io.write(file, pieces)
        os.fsync(file.fd)
        written = time.perf_counter()
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        io.read(file, pieces)
        return TEST_BYTES / 1e6 / (written - start), TEST_BYTES / 1e6 / (time.perf_counter() - written)


def check_shared(path: str) -> Iterator[Finding]:
    """Whether every rank sees a file that rank 0 writes. Called on all ranks.

    Raises:
        OSError: on rank 0, if the folder is missing or cannot be written; a RankFailedError on the others.
    """
    name = f"grass_ds_doctor_{uuid.uuid4().hex}"
    first = dist.get_rank() == 0
    marker = gather_from_ranks(lambda: Path(path).expanduser().absolute() / name)[0]
    gather_from_ranks(lambda: marker.write_text("may be removed\n") if first else None)
    visible = gather_from_ranks(lambda: becomes_visible(marker))
    if first:
        marker.unlink()
    if all(visible):
        yield Finding("shared_path", OK, f"{marker.parent}: all ranks see what rank 0 writes")
    else:
        text = f"{marker.parent}: rank {visible.index(False)} does not see what rank 0 writes"
        yield Finding("shared_path", FAIL, text, "name a folder on a filesystem that all machines share")


def becomes_visible(marker: Path) -> bool:
    """Whether this machine lists the file within :data:`SHARED_SECONDS`."""
    deadline = time.monotonic() + SHARED_SECONDS
    # A network filesystem may answer for a single name from its cache, but it reads the folder anew.
    while not (marker.parent.is_dir() and marker.name in os.listdir(marker.parent)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
