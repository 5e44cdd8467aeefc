# SPDX-License-Identifier: Apache-2.0
"""This rank's state files on a local disk: one preallocated file per unit, in a directory that no other job can take.

[Note: The lock] ``grass_ds_rank<n>.lock`` beside the directory is held by ``flock`` for as long as the files exist.
The kernel releases it when the process ends, however it ends, so the next run replaces what a killed run left behind.
The lock file is removed at the end. A process that had opened it before then would lock a file that no other process
sees. Hence two rules: only its holder removes it, and a lock counts only if the path still leads to the file that was
locked.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from deepspeed.utils import logger

from grass_ds.config import GrassConfigError

ALIGNMENT = 4096
"""Bytes. Offsets, lengths and addresses that are multiples of it suit O_DIRECT on every disk."""

_KEY = "grass.offload.nvme_path"
IN_MEMORY = ("tmpfs", "ramfs")


class OffloadError(RuntimeError):
    """Optimizer state could not be moved to or from the disk; memory and file cannot be relied upon."""


def resolve_path(path: str) -> Path:
    """``path`` as an absolute path, with ``~`` and environment variables put in.

    Raises:
        GrassConfigError: a variable that is not set, or is empty.
    """
    names = [braced or bare for braced, bare in re.findall(r"\$(?:\{(\w+)\}|(\w+))", path)]
    unset = [name for name in names if not os.environ.get(name)]
    if unset:
        raise GrassConfigError(
            f'{_KEY} = "{path}": the environment variable {unset[0]} is not set; set it or write the path out'
        )
    return Path(os.path.expandvars(path)).expanduser().absolute()


@dataclass(frozen=True)
class StateFile:
    """An open file of ``nbytes`` bytes for the state of a unit."""

    path: Path
    fd: int
    nbytes: int

    def check(self) -> None:
        """Raise :class:`OffloadError` if the file is not as long as it was made."""
        # Of the open file, not of the path: a file that was deleted lives on until it is closed, and nothing is lost.
        found = os.fstat(self.fd).st_size
        if found != self.nbytes:
            raise OffloadError(
                f"{self.path} has {found} bytes instead of {self.nbytes}: something else has truncated or written it, "
                "and the optimizer state in it is lost. Resume from a checkpoint"
            )


class StateFiles:
    """One preallocated file per unit in ``root/grass_ds_rank<rank>``, until :meth:`close`.

    Args:
        root: an existing directory on a local disk, which ranks share.
        job: name of this job, for the error of a second job that is given the directory.
        sizes: unit name -> bytes, a multiple of :data:`ALIGNMENT`.

    Attributes:
        direct: whether transfers bypass the page cache (O_DIRECT).

    Raises:
        GrassConfigError: the directory is missing, cannot be written, has too little space, or is used by another job.
            No file is left behind.
    """

    def __init__(self, root: Path, rank: int, job: str, sizes: Mapping[str, int]):
        self.direct = False
        self._root = root
        self._directory = root / f"grass_ds_rank{rank}"
        self._lock_path = root / f"grass_ds_rank{rank}.lock"
        self._lock: int | None = None
        self._files: dict[str, StateFile] = {}
        self._process = os.getpid()
        try:
            self._open_directory(job)
            self._check_space(sum(sizes.values()))
            for name, size in sizes.items():
                self.add(name, size)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise self._explained(error) from error
            raise

    def __getitem__(self, name: str) -> StateFile:
        return self._files[name]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self._files.values())

    def add(self, name: str, nbytes: int) -> None:
        """Make the file of one more unit, unless there is one. If that fails, the other files stay."""
        if name in self._files:
            return
        # Percent-encoded, so that two units cannot share a file.
        path = self._directory / f"{quote(name, safe='')}.state"
        try:
            self._files[name] = StateFile(path, _create(path, nbytes, self.direct), nbytes)
        except OSError as error:
            self._remove(path)
            raise self._explained(error, self.nbytes + nbytes) from error

    def close(self) -> None:
        """Close and remove the files, the directory and the lock. Idempotent; those removed by others are no error."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                os.close(file.fd)
            self._remove(file.path)
        self._files = {}
        if self._lock is not None:
            self._remove(self._directory)
            self._remove(self._lock_path)
            os.close(self._lock)
            self._lock = None

    def _open_directory(self, job: str) -> None:
        """Lock the directory, and empty it."""
        if not self._root.is_dir():
            raise self._refusal(
                ": no such directory. It must exist and is not created, so that a disk that is not mounted is noticed: "
                "mount the disk or create the directory"
            )
        while self._lock is None:
            self._lock = self._try_lock(job)
        self._directory.mkdir(exist_ok=True)
        stale = list(self._directory.glob("*.state"))
        if stale:
            logger.info(f"{self._directory}: removing {len(stale)} state files that an earlier run left behind")
        for path in stale:
            path.unlink()
        self.direct = _supports_direct(self._directory)
        if filesystem(self._root) in IN_MEMORY:
            logger.warning(f'{_KEY} = "{self._root}" is a filesystem in memory: the state still takes RAM')
        elif not self.direct:
            logger.info(f"{self._root} does not support direct I/O: transfers go through the page cache")

    def _try_lock(self, job: str) -> int | None:
        """Lock the directory and write who holds it; None if its former holder removed the lock file meanwhile."""
        with contextlib.ExitStack() as undo:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
            undo.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(lock, ALIGNMENT, 0).decode() or "another process, which has not written its name yet"
                raise self._refusal(
                    f" is in use: {self._lock_path.name} is held by {holder}. Give every job a path of its own, for "
                    'example with "$SLURM_JOB_ID" in it'
                ) from None
            if not _is_at(lock, self._lock_path):
                return None
            since = time.strftime("%Y-%m-%d %H:%M:%S %z")
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"job {job} (process {os.getpid()} on {socket.gethostname()}, since {since})".encode(), 0)
            undo.pop_all()
        return lock

    def _check_space(self, needed: int) -> None:
        available = shutil.disk_usage(self._directory).free
        if available < needed:
            raise self._refusal(
                f": this rank needs {_gigabytes(needed)} for optimizer state, but only {_gigabytes(available)} are "
                'free. Free some space, choose another disk, or set grass.offload.device = "cpu"'
            )

    def _remove(self, path: Path) -> None:
        if os.getpid() != self._process:  # a fork: the files are still its parent's
            return
        try:
            path.rmdir() if path == self._directory else path.unlink()
        except FileNotFoundError:
            pass
        except OSError as error:
            logger.warning(f"{path} could not be removed: {error.strerror}")

    def _explained(self, error: OSError, needed: int = 0) -> GrassConfigError:
        where = f" ({error.filename})" if error.filename else ""
        need = f"; this rank needs {_gigabytes(needed)} so far" if needed else ""
        return self._refusal(
            f": no state file can be made in {self._directory}: {error.strerror}{where}{need}. It must be a writable "
            "directory on a local disk with space for the optimizer state"
        )

    def _refusal(self, reason: str) -> GrassConfigError:
        return GrassConfigError(f'{_KEY} = "{self._root}"{reason}')


def _create(path: Path, nbytes: int, direct: bool) -> int:
    """Make and open a file with that many bytes reserved on the disk."""
    with contextlib.ExitStack() as undo:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        undo.callback(os.close, fd)
        # Before O_DIRECT: where the filesystem cannot preallocate, the C library writes single bytes.
        os.posix_fallocate(fd, 0, nbytes)
        if direct:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR | os.O_DIRECT)
        undo.pop_all()
    return fd


def _supports_direct(directory: Path) -> bool:
    """Whether files can be switched to O_DIRECT and then read in aligned pages."""
    path = directory / "probe.state"
    try:
        with open(_create(path, ALIGNMENT, direct=True), "rb", buffering=0) as file, mmap.mmap(-1, ALIGNMENT) as page:
            return file.readinto(page) == ALIGNMENT
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        path.unlink(missing_ok=True)


def _is_at(fd: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3f} GB"


def filesystem(path: Path) -> str | None:
    """Type of the filesystem that ``path`` is on, None if unknown."""
    device = os.stat(path).st_dev
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, rest = line.partition(" - ")
            if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return rest.split()[0]
    return None
