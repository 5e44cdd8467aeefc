# SPDX-License-Identifier: Apache-2.0
"""Making sure that all ranks decided alike.

Ranks that train different layers mix their gradients without any error from the communication library. So what a decision was made of
is compared across ranks before it is acted on, and every rank stops when it differs anywhere.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from deepspeed import comm as dist


class RankDivergenceError(RuntimeError):
    """Ranks of one run came to different decisions."""


def digest(*values: object) -> int:
    """A 62-bit number that differs when the values' ``repr`` differ."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 2


def check_ranks_agree(
    fingerprint: Sequence[int], what: str, group: Any, device: torch.device | str, fields: Sequence[str] = ()
) -> None:
    """Compare ``fingerprint`` (ints in 0 .. 2**62) across ``group``: one all-reduce of 2 x len(fingerprint) int64.

    ``fields`` name its numbers, so that the error can say which of them differ.

    Raises:
        RankDivergenceError: on every rank, if any rank holds another value.
    """
    mine = torch.tensor([*fingerprint, *(-value for value in fingerprint)], dtype=torch.int64, device=device)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=group)
    largest, smallest = mine[: len(fingerprint)].tolist(), (-mine[len(fingerprint) :]).tolist()
    if largest != smallest:
        differing = [name for name, low, high in zip(fields, smallest, largest, strict=False) if low != high]
        raise RankDivergenceError(
            f"ranks disagree on {what}{' (' + ', '.join(differing) + ')' if differing else ''}; no layer was switched and training stops on every rank. Ranks must run the same code with the "
            f'same "grass" block and seed. This rank (rank {dist.get_rank()}) holds {list(fingerprint)}; over all ranks the values '
            f"range from {smallest} to {largest}."
        )


class RankFailedError(RuntimeError):
    """Another rank of the run failed; the message says which and why."""


def check_ranks_succeeded(error: BaseException | None, group: Any, device: torch.device | str) -> None:
    """Raise on every rank if one of them holds an ``error``: nobody waits in a collective for a rank that has given up.

    One all-reduce of one int64; the messages are exchanged only if there is something to say.

    Raises:
        BaseException: the error itself, on a rank that holds one.
        ValueError: elsewhere, if it is one: a user's mistake.
        RankFailedError: elsewhere.
    """
    failed = torch.tensor([0 if error is None else 1], dtype=torch.int64, device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed.item():
        return
    mine = None if error is None else (dist.get_rank(), isinstance(error, ValueError), str(error))
    everyone: list[Any] = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(everyone, mine, group=group)
    if error is not None:
        raise error
    rank, is_mistake, message = next(entry for entry in everyone if entry is not None)
    raise (ValueError if is_mistake else RankFailedError)(f"rank {rank} failed: {message}")


@contextmanager
def failing_together(group: Any, device: torch.device | str) -> Iterator[None]:
    """Do what may fail on one rank alone inside, without collectives: at the end every rank raises, see :func:`check_ranks_succeeded`."""
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    check_ranks_succeeded(error, group, device)


class Fallible(Protocol):
    """What moves state, in threads of its own too."""

    @property
    def fallible(self) -> bool:
        """Whether it can fail on one rank alone; alike on every rank."""

    @property
    def error(self) -> BaseException | None:
        """What went wrong in a thread so far."""


@contextmanager
def succeeding_together(store: Fallible, group: Any, device: torch.device | str) -> Iterator[None]:
    """Move state inside, without collectives: at the end every rank raises what has gone wrong on one, then or earlier.

    Raises:
        Exception: on a rank that could not move state, what it raised.
        ValueError, RankFailedError: elsewhere, see :func:`check_ranks_succeeded`.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if store.fallible:
        check_ranks_succeeded(error or store.error, group, device)
    elif error is not None:
        raise error
