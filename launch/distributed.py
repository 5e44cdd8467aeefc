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
from functools import partial
from typing import Any, TypeVar

import datasets
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from grass_ds.cluster import placement
from grass_ds.cluster.environment import PlacementError
from grass_ds.core import deepspeed_compat
from grass_ds.core.agreement import RankFailedError, gather_from_ranks
from grass_ds.doctor.extensions import communication_ready

T = TypeVar("T")


class AgreedError(ValueError):
    """A user's mistake that every rank knows of, with the same message."""


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
    return _all_reduce(values, dist.ReduceOp.SUM)


def max_over_ranks(value: float) -> float:
    """The largest of the ranks' values, the same on every rank."""
    return _all_reduce([value], dist.ReduceOp.MAX)[0]


def _all_reduce(values: Sequence[float], op: Any) -> list[float]:
    if world_size() == 1 or not dist.is_initialized():
        return list(values)
    reduced = torch.tensor(values, dtype=torch.float64, device=get_accelerator().current_device_name())
    dist.all_reduce(reduced, op=op)
    return [float(value) for value in reduced.tolist()]


def gather(task: Callable[[], T]) -> list[T]:
    """The results of the ranks' `task`s, in rank order, on every rank; any objects that can be pickled.

    Raises:
        Exception: on every rank if a task fails on any, see `gather_from_ranks`.
    """
    return [task()] if world_size() == 1 or not dist.is_initialized() else gather_from_ranks(task)


def on_every_rank(action: Callable[[], T], at_once: bool = False) -> T:
    """The result of `action` on this rank; if it fails on any rank, every rank raises, so that none waits for another.

    On each machine local rank 0 goes first: it fills the caches (converted model, tokenized data) for the others. With
    `at_once` it does not: for what ranks do together, like loading a model of which each keeps a part.

    Raises:
        AgreedError: a ValueError or OSError on any rank, with the message of the first.
        Exception: any other error here; `RankFailedError` on the other ranks.
    """
    results: list[T] = []

    failure: Exception | None = None

    def attempt(mine: bool) -> str | None:
        nonlocal failure
        try:
            results.extend([action()] if mine else [])
        except (ValueError, OSError) as error:
            failure = error
        return None if failure is None else f"{failure}"

    first = local_rank() == 0
    for mine in (True,) if at_once else (first, not first):
        mistakes = [message for message in gather(partial(attempt, mine)) if message is not None]
        if mistakes:
            raise AgreedError(mistakes[0]) from failure
    return results[0]


def is_communication_error(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: gloo has no exception of its own."""
    signs = r"gloo|NCCL|c10d|Connection (reset|closed|refused)"
    return isinstance(error, RuntimeError) and re.search(signs, str(error)) is not None


_first: list[bool] = []


def first_to_fail(otherwise: bool = True, seconds: float = 5.0) -> bool:
    """Whether this rank is the first that asks, and so the one that tells the user what went wrong.

    Args:
        otherwise: the answer where the process group's store, which the ranks ask, gives none within `seconds`: its
            host may be gone.
    """
    if not dist.is_initialized() or world_size() == 1:
        return True
    if not _first:

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                _first.append(torch.distributed.distributed_c10d._get_default_store().add("grass_failed", 1) == 1)

        # A call to a store whose host is gone outlasts any time-out.
        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(seconds)
    return _first[0] if _first else otherwise


def speaks_of(error: Exception) -> bool:
    """Whether this rank shows the traceback of `error`: where it began, not where it was heard of."""
    heard = isinstance(error, RankFailedError)
    return not heard and first_to_fail(otherwise=not is_communication_error(error))


def own_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line without the --local_rank that DeepSpeed's launcher adds; LOCAL_RANK says the same."""
    return [argument for argument in arguments if not argument.startswith("--local_rank")]


def report_error(error: Exception) -> None:
    """Say what ended the run, on one rank: the first that fails.

    Before there is a process group: on one rank of each machine, whose files may differ, and on each rank whose launcher
    has set it wrongly.
    """
    own = isinstance(error, PlacementError) or local_rank() == 0
    if first_to_fail() if dist.is_initialized() else own:
        where = "" if isinstance(error, AgreedError) or world_size() == 1 else f" [rank {rank()}]"
        print(f"\nerror{where}: {error}", file=sys.stderr, flush=True)
