"""The few things the scripts do together on all ranks; all of them also work in a single process."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import datasets
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from grass_ds.cluster import placement
from grass_ds.core import deepspeed_compat
from grass_ds.doctor.extensions import communication_ready

T = TypeVar("T")


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
    deepspeed_compat.silence_renamed_collectives()
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
    placement.leave_process_group()


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


def gather(value: T) -> list[T]:
    """The ranks' values, in rank order, on every rank; any object that can be pickled."""
    if world_size() == 1 or not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


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
        messages = gather(f"{failure}" if failure is not None else None)
        failures = [message for message in messages if message is not None]
        if failures:
            raise AgreedError(failures[0]) from failure
    return result  # type: ignore[return-value]


def is_communication_error(error: BaseException) -> bool:
    """Whether a collective failed, as it does when a rank at its other end is gone: gloo has no exception of its own."""
    return (
        isinstance(error, RuntimeError)
        and re.search(r"gloo|NCCL|c10d|Connection (reset|closed|refused)", str(error)) is not None
    )


_speaks: list[bool] = []


def first_to_fail(otherwise: bool = True, seconds: float = 5.0) -> bool:
    """Whether this rank is the first that asks, and so the one that tells the user what went wrong.

    Args:
        otherwise: the answer where the process group's store, which the ranks ask, does not give one within ``seconds``: its host may be gone.
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
    return _speaks[0] if _speaks else otherwise


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without the --local_rank that DeepSpeed's launcher adds; LOCAL_RANK says the same."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def report_error(error: Exception) -> None:
    """Say what ended the run, on one rank: the first that fails, before there is a process group rank 0."""
    if first_to_fail() if dist.is_initialized() else rank() == 0:
        where = "" if isinstance(error, AgreedError) or world_size() == 1 else f" [rank {rank()}]"
        print(f"\nerror{where}: {error}", file=sys.stderr, flush=True)
