# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints: durable, visible only when complete, and in the background if wished. See [Note: Publication]."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.utils import logger

from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint.folder import Part, SummedFile
from grass_ds.checkpoint.snapshot import snapshot
from grass_ds.core import deepspeed_compat
from grass_ds.core.agreement import gather_from_ranks, raise_on_all_ranks

# Seconds that a checkpoint written in the background waits for another rank's part before it is given up.
PATIENCE = 600.0
# The same once the engine is destroyed.
LAST_PATIENCE = 60.0
_POLL = 0.05


@dataclass
class SaveReport:
    """The last checkpoint of this rank.

    Attributes:
        bytes: written by this rank.
        stall_seconds: that training stood still.
        seconds: until this rank's files were on disk; None while they are being written.
    """

    tag: str
    bytes: int = 0
    stall_seconds: float = 0.0
    seconds: float | None = None

    def sentence(self) -> str:
        stall = f"checkpoint {self.tag}: training stood still for {self.stall_seconds:.2f} s"
        return stall + (
            "; it is being written" if self.seconds is None else f", {self.bytes / 1e6:.1f} MB on this rank"
        )


@dataclass
class _Save:
    """One checkpoint on its way: what this rank has still to write, and what became of it."""

    folder: Path
    tag: str
    latest: bool
    part: Part
    report: SaveReport
    began: float = field(default_factory=time.perf_counter)
    waiting: list[tuple[Any, Path]] = field(default_factory=list)
    error: BaseException | None = None
    given_up: threading.Event = field(default_factory=threading.Event)
    deadline: float = math.inf
    written: "Future[None] | None" = None
    published: "Future[None] | None" = None

    @property
    def path(self) -> Path:
        return folders.saving_path(self.folder, self.tag)

    def write(self, content: Any, path: Path, zipped: bool) -> None:
        with SummedFile(path) as file:
            try:
                torch.save(content, cast(IO[bytes], file), _use_new_zipfile_serialization=zipped)
            except RuntimeError as error:  # what torch makes of an error in the file
                raise file.error or error from None
        self.part.files[path.relative_to(self.path).as_posix()] = file.sums
        self.report.bytes += file.bytes

    def write_waiting(self, zipped: bool) -> None:
        """Write what waits, then the part that says so."""
        while self.waiting:
            content, path = self.waiting.pop(0)
            self.write(content, path, zipped)
            del content
        folders.sync_folder(self.path)
        self.part.write(self.path)
        self.report.seconds = time.perf_counter() - self.began

    def publish(self) -> None:
        """On rank 0: make it visible once all parts are there."""
        assert self.written is not None
        if self.written.exception() is not None:  # on this rank: its part will not come
            return
        missing = list(range(self.part.world_size))
        self.deadline = min(self.deadline, time.monotonic() + PATIENCE)
        while missing := [rank for rank in missing if not (self.path / Part.name(rank)).exists()]:
            if self.given_up.wait(_POLL):
                return
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"checkpoint {self.tag}: rank {missing[0]} has not written its part")
        folders.publish(self.folder, self.tag, self.latest)

    def give_up(self) -> None:
        """Stop waiting for parts; on rank 0 the place is cleared."""
        self.given_up.set()
        if self.part.rank == 0:
            if self.published is not None:
                self.published.exception()
            folders.give_up(self.folder, self.tag)


class CheckpointWriter(deepspeed_compat.TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine of a layer-sampled run.

    The engine calls :meth:`begin`, has DeepSpeed save into :func:`~grass_ds.checkpoint.folder.saving_path`, which ends in
    :meth:`commit`, and calls :meth:`end` if that failed. All of these are called on every rank.

    Args:
        config: the DeepSpeed config.
        group, device: for the ranks' agreement.
        background: ``"checkpoint": {"async": true}``: :meth:`save` copies, a thread writes and publishes.

    Attributes:
        report: on the last checkpoint; None before the first.
    """

    def __init__(self, config: Any, group: Any, device: torch.device, background: bool):
        super().__init__(config)
        self._group, self._device = group, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="grass_ds checkpoint") if background else None
        self._open: _Save | None = None  # DeepSpeed is saving into it
        self._underway: _Save | None = None  # being written and published
        self.report: SaveReport | None = None

    # ---- what the engine calls ------------------------------------------------------------------------------------------

    def begin(self, folder: Path, tag: str, latest: bool, part: Part) -> SaveReport:
        """Make the place for a checkpoint, once the one before is done.

        Raises:
            Exception: on every rank: that one failed, the ranks mean different places, or the place cannot be made. Published checkpoints
                are untouched.
        """
        self.wait()
        self._check_same_place(folder / tag)
        folders.check_tag(tag)
        with raise_on_all_ranks(self._group, self._device):
            if part.rank == 0:
                folders.begin(folder, tag)
        self.report = SaveReport(tag)
        self._open = _Save(folder, tag, latest, part, self.report)
        return self.report

    def note(self, error: Exception) -> None:
        """What this rank could not hand over; told in :meth:`commit`, where all ranks are."""
        assert self._open is not None
        self._open.error = self._open.error or error

    def end(self) -> None:
        """Give up the checkpoint that DeepSpeed did not come to an end with, if there is one."""
        if self._open is not None:
            self._open.give_up()
            self._open = None

    def wait(self) -> None:
        """Block until the checkpoint under way is published.

        Raises:
            Exception: on every rank, what went wrong on one; the checkpoint is gone then, earlier ones are as they were.
        """
        save, self._underway = self._underway, None
        if save is None:
            return
        try:
            with raise_on_all_ranks(self._group, self._device):
                assert save.written is not None
                save.written.result()
            with raise_on_all_ranks(self._group, self._device):
                if save.part.rank == 0 and save.published is None:
                    save.published = self._run(save.publish)
                if save.published is not None:
                    save.published.result()
        except BaseException:
            save.give_up()
            raise

    def close(self) -> None:
        """Finish what is under way, without the other ranks; what goes wrong is logged. Idempotent."""
        self.end()
        save, self._underway = self._underway, None
        if save is not None:
            save.deadline = min(save.deadline, time.monotonic() + LAST_PATIENCE)
        if self._pool is not None:
            self._pool.shutdown()
        if save is not None and any(task is not None and task.exception() for task in (save.written, save.published)):
            save.give_up()

    # ---- what DeepSpeed calls -------------------------------------------------------------------------------------------

    def create(self, info: Any) -> None:
        """Nothing: see :meth:`begin`."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if self._open is None:
            super().makedirs(path, exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file, or copy its content to write it later. What goes wrong is told in :meth:`commit`, where all ranks are."""
        save = self._open
        if save is None:  # save_16bit_model
            super().save(state_dict, path)
            return
        try:
            if self._pool is None:
                save.write(state_dict, Path(path), self.zipfile_serialization)
            else:
                save.waiting.append((snapshot(state_dict), Path(path)))
        except Exception as error:
            self.note(error)

    def commit(self, info: Any) -> bool:
        """The last file was handed over: publish, or begin to."""
        save = self._open
        if save is None:
            return True
        with raise_on_all_ranks(self._group, self._device):
            if save.error is not None:
                raise save.error
        save.written = self._run(lambda: save.write_waiting(self.zipfile_serialization))
        if self._pool is not None and save.part.rank == 0:
            save.published = self._run(save.publish)
        self._open, self._underway = None, save
        if self._pool is None:
            self.wait()
        return True

    # ---- inside ---------------------------------------------------------------------------------------------------------

    def _run(self, task: Callable[[], None]) -> "Future[None]":
        """Do it in the background, or at once."""
        if self._pool is not None:
            future = self._pool.submit(task)
            future.add_done_callback(_log_failure)
            return future
        done: Future[None] = Future()
        try:
            task()
            done.set_result(None)
        except Exception as error:
            done.set_exception(error)
        return done

    def _check_same_place(self, checkpoint: Path) -> None:
        places = gather_from_ranks(lambda: str(checkpoint), self._group)
        for rank, place in enumerate(places):
            if place != places[0]:
                raise ValueError(
                    f"rank 0 saves a checkpoint to {places[0]} and rank {rank} to {place}; call save_checkpoint() with the same save_dir "
                    "and tag on every rank"
                )


def _log_failure(task: "Future[None]") -> None:
    """At once: training goes on, and the error is raised only when all ranks meet for the next checkpoint."""
    if (error := task.exception()) is not None:
        logger.error(f"grass_ds: the checkpoint under way will not be published: {type(error).__name__}: {error}")
