# SPDX-License-Identifier: Apache-2.0
"""The folder for optimizer state on a local disk, and the folder that all machines share."""

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from grass_ds.doctor.finding import FAIL, OK, WARN, Finding
from grass_ds.offload.block_io import AioSettings, Piece, PosixIO
from grass_ds.offload.pinned_memory import HostMemory
from grass_ds.offload.state_files import IN_MEMORY, StateFiles, filesystem, resolve_path

TEST_BYTES = 256 * 2**20
SHARED_SECONDS = 30.0
"""How long a new file may take to be seen on another machine: NFS looks at a folder again after 30 seconds at the latest."""
NETWORK = ("nfs", "nfs4", "cifs", "lustre", "gpfs", "beegfs", "ceph", "fuse.glusterfs", "9p")


def check_nvme(path: str) -> Iterator[Finding]:
    """Space, filesystem and speed of the folder for ``grass.offload.nvme_path``, measured in a file that is removed again.

    Raises:
        GrassConfigError: whatever training would refuse it for.
    """
    name, root = "nvme_path", resolve_path(path)
    if not root.is_dir():
        yield Finding(name, FAIL, f"{root}: no such directory", "mount the disk or create the directory")
        return
    kind = filesystem(root)
    if kind in IN_MEMORY:
        yield Finding(
            name,
            WARN,
            f"{root} is a {kind}: the state still takes RAM",
            'choose a local disk, or grass.offload.device = "cpu"',
        )
    elif kind in NETWORK:
        yield Finding(
            name, WARN, f"{root} is on {kind}: all machines share its speed", "choose a local disk of each machine"
        )
    with tempfile.TemporaryDirectory(dir=root, prefix="grass_ds_doctor_") as folder:
        files = StateFiles(Path(folder), 0, "doctor", {"speed": TEST_BYTES})
        try:
            written, read = _measure(files)
        finally:
            files.close()
    way, free = "direct I/O" if files.direct else "without direct I/O", shutil.disk_usage(root).free
    text = f"{root} ({kind}): {free / 1e9:.0f} GB free, writes {written:.0f} MB/s, reads {read:.0f} MB/s, {way}"
    yield Finding(
        name, OK if files.direct else WARN, text, "" if files.direct else "choose a local disk with ext4 or xfs"
    )


def _measure(files: StateFiles) -> tuple[float, float]:
    """Writing and reading, in MB/s."""
    memory, io = HostMemory(TEST_BYTES, pin=False), PosixIO(AioSettings.parse({}))
    try:
        memory.data.view(torch.int64).random_()  # some disks compress
        file, pieces = files["speed"], [Piece(memory.data, 0)]
        start = time.perf_counter()
        io.write(file, pieces)
        os.fsync(file.fd)
        written = time.perf_counter()
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        io.read(file, pieces)
        return TEST_BYTES / 1e6 / (written - start), TEST_BYTES / 1e6 / (time.perf_counter() - written)
    finally:
        io.close()


def leave_mark(path: str) -> dict[str, str]:
    """Write a small file into the shared folder: where it is ("path"), or why it is not ("error")."""
    mark = Path(path).expanduser().absolute() / f"grass_ds_doctor_{uuid.uuid4().hex}"
    try:
        mark.write_text("may be removed\n")
    except OSError as error:
        return {"path": str(mark), "error": str(error.strerror)}
    return {"path": str(mark), "error": ""}


def check_mark(mark: Mapping[str, str]) -> Iterator[Finding]:
    """Whether this rank sees the file of :func:`leave_mark`."""
    path, deadline = Path(mark["path"]), time.monotonic() + SHARED_SECONDS
    remedy = "name an existing folder on a filesystem that all machines share, and that you may write to"
    if mark["error"]:
        yield Finding("shared_path", FAIL, f"{path.parent}: {mark['error']}", remedy)
        return
    while not _listed(path):
        if time.monotonic() > deadline:
            text = f"{path.parent}: what rank 0 wrote there is not seen after {SHARED_SECONDS:.0f} s"
            yield Finding("shared_path", FAIL, text, remedy)
            return
        time.sleep(0.2)
    yield Finding("shared_path", OK, f"{path.parent}: what rank 0 writes is seen")


def remove_mark(mark: Mapping[str, str]) -> None:
    """Remove the file of :func:`leave_mark`, if there is one."""
    Path(mark["path"]).unlink(missing_ok=True)


def _listed(path: Path) -> bool:
    """Whether it exists, asked in the way that a network filesystem does not answer from memory."""
    return path.parent.is_dir() and path.name in os.listdir(path.parent)
