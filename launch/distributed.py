"""The few things the scripts do together on all ranks; all of them also work in a single process."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import datasets
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from grass_ds import placement
from grass_ds.doctor.extensions import communication_ready
from grass_ds.runtime import seams

T = TypeVar("T")
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells say it."""


class AgreedError(ValueError):
    """A failure that every rank knows of, with the same message."""


def rank() -> int:
    """The global rank of this process (0 without a launcher)."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The rank of this process on its machine (0 without a launcher)."""
    here = placement.exported()
    return int(os.environ.get("LOCAL_RANK", "0")) if here is None else here.local_rank


def world_size() -> int:
    """The number of processes (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(timeout_minutes: float = 30.0) -> None:
    """Join the process group that the launcher describes; without a launcher, one process of its own.

    Raises:
        PlacementError: what launchers say is contradictory or incomplete.
    """
    placement.find().export()
    seams.silence_renamed_collectives()
    if rank() != 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    if rank() == 0 and not communication_ready():
        print("compiling what DeepSpeed's ranks talk through (a few minutes, once)", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints on every rank which library it has loaded
        dist.init_distributed(verbose=False, timeout=timedelta(minutes=timeout_minutes))


def stop() -> None:
    """Leave the process group, if one was joined."""
    placement.leave()


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Each value summed over all ranks, the same on every rank."""
    if world_size() == 1 or not dist.is_initialized():
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(total)
    return [float(value) for value in total.tolist()]


def max_over_ranks(value: float) -> float:
    """The largest of the ranks' values, the same on every rank."""
    if world_size() == 1 or not dist.is_initialized():
        return value
    largest = torch.tensor([value], dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest.item())


def on_every_rank(action: Callable[[], T], at_once: bool = False) -> T:
    """Run `action` on every rank; if it fails on any rank, raise on every rank, so that none waits for another.

    On each machine local rank 0 goes first: it fills the caches (converted model, tokenized data) for the others. With `at_once`
    it does not: for what ranks do together, like loading a model of which each keeps a part.

    Raises:
        AgreedError: with the first failing rank's message.
    """
    result: T | None = None
    failure: Exception | None = None
    for turn in range(1 if at_once else 2):
        if at_once or (turn == 0) == (local_rank() == 0):
            try:
                result = action()
            except (ValueError, OSError) as error:
                failure = error
        failures = _gather(f"{failure}" if failure is not None else None)
        if failures:
            raise AgreedError(failures[0]) from failure
    return result  # type: ignore[return-value]


def _gather(message: str | None) -> list[str]:
    """The messages of the ranks that have one, in rank order."""
    if world_size() == 1 or not dist.is_initialized():
        return [message] if message is not None else []
    messages: list[str | None] = [None] * world_size()
    dist.all_gather_object(messages, message)
    return [found for found in messages if found is not None]


def is_communication_error(error: BaseException) -> bool:
    """Whether a collective failed, as it does when a rank at its other end is gone: gloo has no exception of its own."""
    return (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|NCCL|c10d|Connection (reset|closed|refused)", str(error)) is not None
    )


_speaks: list[bool] = []


def first_to_fail(seconds: float = 5.0) -> bool:
    """Whether this rank is the first that asks, and so the one that tells the user what went wrong.

    The ranks ask the process group's store. Where its host is gone, a rank that was there spoke before.
    """
    if not dist.is_initialized() or world_size() == 1:
        return True
    if not _speaks:

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                _speaks.append(torch.distributed.distributed_c10d._get_default_store().add("grass_failed", 1) == 1)

        # A call to a store whose host is gone outlasts any time-out.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(seconds)
    return bool(_speaks) and _speaks[0]


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends the process at once, with one message from rank 0. The ranks may wait in a collective: no clean-up could finish.

    A handler, not the exception: launchers send SIGTERM right after it, which asks for a checkpoint at the end of the step.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process and rank() == 0:
            os.write(2, b"\ninterrupted\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without the --local_rank that DeepSpeed's launcher adds; LOCAL_RANK says the same."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def report_error(error: Exception) -> None:
    """Say what ended the run: once per machine where all ranks agree on it, else by every rank that failed.

    The launcher ends the other ranks as soon as one has failed, so a rank cannot leave it to another to speak.
    """
    if isinstance(error, AgreedError) and local_rank() != 0:
        return
    where = "" if isinstance(error, AgreedError) or world_size() == 1 else f" [rank {rank()}]"
    print(f"\nerror{where}: {error}", file=sys.stderr, flush=True)
