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
import json
import mmap
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
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
    """An open file of ``nbytes`` bytes for the state of the unit ``name``."""

    name: str
    path: Path
    fd: int
    nbytes: int

    def check(self) -> None:
        """Raise :class:`OffloadError` if the file is not as long as it was made."""
        # Of the open file, not of the path: a file that was deleted lives on until it is closed, and nothing is lost.
        try:
            found = os.fstat(self.fd).st_size
        except OSError as error:
            raise OffloadError(f"{self.path}: {error.strerror}") from error
        if found != self.nbytes:
            raise OffloadError(
                f"{self.path} has {found} bytes instead of {self.nbytes}: something else has truncated or written it, "
                "and the optimizer state in it is lost. Resume from a checkpoint"
            )


class StateFiles:
    """One preallocated file per unit in ``root/grass_ds_rank<rank>``, until :meth:`close`.

    ``root`` is not created: on a disk that is not mounted the state would land wherever the mount point is.

    Args:
        root: an existing directory on a local disk.
        rank: distinguishes the ranks that share the directory.
        job: name of this job, for the error of a second job that is given the directory.
        sizes: unit name -> bytes, a multiple of :data:`ALIGNMENT`.

    Attributes:
        direct: whether transfers bypass the page cache (O_DIRECT).

    Raises:
        GrassConfigError: the directory is missing, cannot be written, has too little space, or is used by another job.
            No file is left behind.
        ValueError: a size that is not a positive multiple of :data:`ALIGNMENT`.
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
        except OSError as error:
            self.close()
            raise self._explained(error) from error
        except BaseException:
            self.close()
            raise

    def __getitem__(self, name: str) -> StateFile:
        return self._files[name]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self._files.values())

    def add(self, name: str, nbytes: int) -> None:
        """Make the file of one more unit; nothing to do if there is one of that size.

        Raises:
            GrassConfigError: it cannot be made; it is then removed again, the others stay.
            ValueError: a size that is not a positive multiple of :data:`ALIGNMENT`, or another than the file has.
        """
        if nbytes <= 0 or nbytes % ALIGNMENT:
            raise ValueError(f"{name}: {nbytes} bytes; a positive multiple of {ALIGNMENT} is needed")
        if name in self._files:
            if self._files[name].nbytes != nbytes:
                raise ValueError(f"{self._files[name].path} has {self._files[name].nbytes} bytes, asked for {nbytes}")
            return
        # Percent-encoded, so that two units cannot share a file.
        path = self._directory / f"{quote(name, safe='')}.state"
        try:
            self._files[name] = StateFile(name, path, _create(path, nbytes, self.direct), nbytes)
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
        if self._lock is None:
            return
        self._remove(self._directory)
        self._remove(self._lock_path)
        os.close(self._lock)
        self._lock = None

    def _open_directory(self, job: str) -> None:
        """Lock the directory, and empty it."""
        if not self._root.is_dir():
            raise GrassConfigError(
                f'{_KEY} = "{self._root}": no such directory. It must exist and is not created, so that a disk '
                "that is not mounted is noticed: mount the disk or create the directory"
            )
        self._lock = self._take_lock(job)
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

    def _take_lock(self, job: str) -> int:
        while True:
            lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_at(lock, self._lock_path):  # its former holder removed it in between
                    os.close(lock)
                    continue
                os.ftruncate(lock, 0)
                os.pwrite(lock, json.dumps(_holder(job)).encode(), 0)
                return lock
            except BlockingIOError:
                holder = _read_holder(lock)
                os.close(lock)
                raise GrassConfigError(
                    f'{_KEY} = "{self._root}" is in use: {self._lock_path.name} is held by {holder}. Give every job a '
                    'path of its own, for example with "$SLURM_JOB_ID" in it'
                ) from None
            except BaseException:
                os.close(lock)
                raise

    def _check_space(self, needed: int) -> None:
        disk = os.statvfs(self._directory)
        available = disk.f_bavail * disk.f_frsize
        if available < needed:
            raise GrassConfigError(
                f'{_KEY} = "{self._root}": this rank needs {_gigabytes(needed)} for optimizer state, but only '
                f"{_gigabytes(available)} are free. Free some space, choose another disk, or set "
                'grass.offload.device = "cpu"'
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
        return GrassConfigError(
            f'{_KEY} = "{self._root}": no state file can be made in {self._directory}: {error.strerror}{where}{need}. '
            "It must be a writable directory on a local disk with space for the optimizer state"
        )


def _create(path: Path, nbytes: int, direct: bool) -> int:
    """Make and open a file with that many bytes reserved on the disk."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Before O_DIRECT: where the filesystem cannot preallocate, the C library writes single bytes.
        os.posix_fallocate(fd, 0, nbytes)
        if direct:
            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR | os.O_DIRECT)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _supports_direct(directory: Path) -> bool:
    """Whether files can be switched to O_DIRECT and then read in aligned pages."""
    path = directory / "probe.state"
    try:
        fd = _create(path, ALIGNMENT, direct=True)
        try:
            with mmap.mmap(-1, ALIGNMENT) as page:
                return os.preadv(fd, [page], 0) == ALIGNMENT
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    finally:
        path.unlink(missing_ok=True)


def _is_at(fd: int, path: Path) -> bool:
    """Whether ``path`` leads to the open file."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(path))
    return False


def _holder(job: str) -> dict[str, Any]:
    return {
        "job": job,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _read_holder(lock: int) -> str:
    try:
        holder = json.loads(os.pread(lock, ALIGNMENT, 0))
        return "job {job} (process {pid} on {host}, since {since})".format_map(holder)
    except (ValueError, KeyError, TypeError):
        return "another process, which has not written its name yet"


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
