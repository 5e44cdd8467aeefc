# SPDX-License-Identifier: Apache-2.0
"""Files that survive a power failure: fsync of files and folders, replacement by a rename."""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def syncing(folder: Path) -> Iterator[None]:
    """On exit, wait until the names in ``folder`` are on disk. The folder itself may be renamed inside.

    Two failures are ignored: some network file systems do not sync folders, and some folders cannot be read.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        yield
        return
    try:
        yield
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on disk, see :func:`syncing`."""
    with syncing(folder):
        pass


def replace_file(path: Path, content: str) -> None:
    """Write a small text file atomically and durably. If that fails (OSError), ``path`` is unchanged."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    with syncing(path.parent):  # another process may rename the folder as soon as it sees the file
        os.replace(temporary, path)


def listed(items: Sequence[str], most: int = 4) -> str:
    """The first ``most`` items and the number of the others: "a, b and 3 more"."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")
