# SPDX-License-Identifier: Apache-2.0
"""Writes checkpoints, in the background if asked. See [Note: Publication] in :mod:`~grass_ds.checkpoint.folder`."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import logger

from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint.part import Part, write_summed
from grass_ds.checkpoint.snapshot import snapshot
from grass_ds.core import deepspeed_compat
from grass_ds.core.agreement import gather_from_ranks, raise_on_all_ranks

# Seconds that rank 0 waits for the parts of other ranks; the second once the engine is destroyed.
PART_TIMEOUT = 600.0
LAST_PART_TIMEOUT = 60.0
_POLL_SECONDS = 0.05


@dataclass
class SaveReport:
    """Size and times of the last checkpoint."""

    tag: str
    bytes: int = 0  # written by this rank so far
    stall_seconds: float = 0.0  # that training stood still
    seconds: float | None = None  # until this rank's files were on disk; None before that

    def sentence(self) -> str:
        rest = "; it is being written" if self.seconds is None else f", {self.bytes / 1e6:.1f} MB on this rank"
        return f"checkpoint {self.tag}: training stood still for {self.stall_seconds:.2f} s{rest}"


@dataclass
class _Save:
    """One checkpoint until it is published."""

    folder: Path
    tag: str
    latest: bool
    part: Part
    report: SaveReport
    zipped: bool
    started: float = field(default_factory=time.perf_counter)
    queue: list[tuple[Any, Path]] = field(default_factory=list)  # contents to write, and their paths
    error: BaseException | None = None  # the first one while DeepSpeed handed over the contents
    aborted: threading.Event = field(default_factory=threading.Event)  # ends the waiting for other ranks' parts
    deadline: float = math.inf  # of that waiting (time.monotonic)
    written: Future[None] = field(default_factory=Future)  # of write_queue()
    published: Future[None] | None = None  # of publish()

    def write(self, content: Any, path: Path) -> None:
        sums = write_summed(content, path, self.zipped)
        self.part.files[path.relative_to(folders.saving_path(self.folder, self.tag)).as_posix()] = sums
        self.report.bytes += sums.bytes

    def write_queue(self) -> None:
        """Write all queued files, then this rank's part, which makes them count."""
        while self.queue:
            self.write(*self.queue.pop(0))  # frees the copy before the next file is written
        self.part.write(folders.saving_path(self.folder, self.tag))
        self.report.seconds = time.perf_counter() - self.started

    def publish(self) -> None:
        """Make the checkpoint visible once all parts are there. On rank 0, after :meth:`write_queue`."""
        if self.written.exception() is not None:  # this rank's part is missing for good
            return
        path = folders.saving_path(self.folder, self.tag)
        missing = list(range(self.part.world_size))
        self.deadline = min(self.deadline, time.monotonic() + PART_TIMEOUT)
        while missing := [rank for rank in missing if not (path / Part.name(rank)).exists()]:
            if self.aborted.wait(_POLL_SECONDS):
                return
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"checkpoint {self.tag}: rank {missing[0]} has not written its part")
        folders.publish(self.folder, self.tag, self.latest)

    def abort(self) -> None:
        """Stop waiting for parts; rank 0 removes the folder."""
        self.aborted.set()
        if self.part.rank == 0:
            if self.published is not None:
                self.published.exception()
            folders.discard(self.folder, self.tag)


class CheckpointWriter(deepspeed_compat.TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine of a layer-sampled run.

    On every rank, the engine calls :meth:`start`, then DeepSpeed's ``save_checkpoint``, which calls :meth:`save` per
    file and :meth:`commit` at its end, then :meth:`abort_unfinished`. ``group`` and ``device`` are for collectives.
    With ``background`` (``"checkpoint": {"async": true}``) :meth:`save` copies, and a thread writes and publishes.
    """

    def __init__(self, config: Any, group: Any, device: torch.device, background: bool):
        super().__init__(config)
        self._group, self._device, self._background = group, device, background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grass_ds checkpoint")
        self._open: _Save | None = None  # DeepSpeed hands over its contents
        self._committed: _Save | None = None  # is written and published
        self.report: SaveReport | None = None  # on the last checkpoint

    def start(self, folder: Path, tag: str, latest: bool, part: Part) -> SaveReport:
        """Wait for the checkpoint before, then make the folder of this one.

        Raises:
            ValueError: on every rank: a bad tag, or the ranks were given different folders.
            Exception: on every rank: the checkpoint before failed, or the folder cannot be made.
        """
        self.wait()
        first, *others = gather_from_ranks(lambda: str(folder / tag), self._group)
        for rank, path in enumerate(others, start=1):
            if path != first:
                raise ValueError(
                    f"rank 0 saves a checkpoint to {first} and rank {rank} to {path}; call save_checkpoint() with the "
                    "same save_dir and tag on every rank"
                )
        folders.check_tag(tag)
        with raise_on_all_ranks(self._group, self._device):
            if part.rank == 0:
                folders.prepare(folder, tag)
        self.report = SaveReport(tag)
        self._open = _Save(folder, tag, latest, part, self.report, self.zipfile_serialization)
        return self.report

    def add_error(self, error: Exception) -> None:
        """Keep an error of this rank until :meth:`commit`, which raises it on all ranks."""
        assert self._open is not None
        self._open.error = self._open.error or error

    def abort_unfinished(self) -> None:
        """Remove a checkpoint that was started and not committed, if there is one."""
        if self._open is not None:
            self._open.abort()
            self._open = None

    def wait(self) -> None:
        """Block until the committed checkpoint is published.

        Raises:
            Exception: on every rank, if one failed. That checkpoint is removed; earlier ones are untouched.
        """
        save, self._committed = self._committed, None
        if save is None:
            return
        try:
            with raise_on_all_ranks(self._group, self._device):
                save.written.result()
            with raise_on_all_ranks(self._group, self._device):
                if save.part.rank == 0:
                    # Not asynchronous: only now, as all parts are there and none has to be waited for.
                    save.published = save.published or self._run(save.publish)
                    save.published.result()
        except BaseException:
            save.abort()
            raise

    def close(self) -> None:
        """Finish the committed checkpoint without collectives; errors are logged. Idempotent."""
        self.abort_unfinished()
        save, self._committed = self._committed, None
        if save is not None:
            save.deadline = min(save.deadline, time.monotonic() + LAST_PART_TIMEOUT)
        self._thread.shutdown()
        if save is not None and any(task is not None and task.exception() for task in (save.written, save.published)):
            save.abort()

    def create(self, info: Any) -> None:
        """Does nothing, see :meth:`start`."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, or copy its content to write it later. :meth:`commit` raises the errors."""
        if self._open is None:  # save_16bit_model
            super().save(state_dict, path)
            return
        try:
            if self._background:
                self._open.queue.append((snapshot(state_dict), Path(path)))
            else:
                self._open.write(state_dict, Path(path))
        except Exception as error:
            self.add_error(error)

    def commit(self, info: Any) -> bool:
        """Publish, or start to, after the last :meth:`save`."""
        save = self._open
        if save is None:
            return True
        with raise_on_all_ranks(self._group, self._device):
            if save.error is not None:
                raise save.error
        save.written = self._run(save.write_queue)
        if self._background and save.part.rank == 0:
            save.published = self._run(save.publish)
        self._open, self._committed = None, save
        if not self._background:
            self.wait()
        return True

    def _run(self, task: Callable[[], None]) -> Future[None]:
        """Run ``task`` in the thread. An error is logged when it happens, and raised on all ranks by :meth:`wait`."""
        future = self._thread.submit(task)
        future.add_done_callback(_log_failure)
        return future


def _log_failure(task: Future[None]) -> None:
    if (error := task.exception()) is not None:
        logger.error(f"grass_ds: the checkpoint will not be published: {type(error).__name__}: {error}")
