# SPDX-License-Identifier: Apache-2.0
"""Making sure that all ranks decided alike.

Ranks that train different layers mix their gradients without any error from the communication library. So what a
decision was made of is compared across ranks before it is acted on, and every rank stops when it differs anywhere.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from deepspeed import comm as dist

T = TypeVar("T")


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
        names = f" ({', '.join(differing)})" if differing else ""
        raise RankDivergenceError(
            f"ranks disagree on {what}{names}; no layer was switched and training stops on every rank. Ranks must run the "
            f'same code with the same "grass" block and seed. This rank (rank {dist.get_rank()}) holds {list(fingerprint)}; '
            f"over all ranks the values range from {smallest} to {largest}."
        )


class RankFailedError(RuntimeError):
    """Another rank of the run failed; the message says which and why."""


class Fallible(Protocol):
    """What moves state, in threads of its own too."""

    @property
    def fallible(self) -> bool:
        """Whether it can fail on one rank alone; alike on every rank."""

    @property
    def error(self) -> BaseException | None:
        """What went wrong in a thread so far."""


@contextmanager
def raise_on_all_ranks(group: Any, device: torch.device | str, source: Fallible | None = None) -> Iterator[None]:
    """Do what may fail on one rank alone inside, without collectives: if it does, every rank raises at the end.

    Nobody waits in a collective for a rank that has given up. One all-reduce of one int64; the messages are exchanged
    only if a rank failed.

    Args:
        source: what has failed in a thread counts, too; and if it cannot fail on one rank alone, nothing crosses
            ranks.

    Raises:
        Exception: the error itself, on a rank that holds one.
        ValueError: elsewhere, if it is one: a user's mistake.
        RankFailedError: elsewhere.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if source is None or source.fallible:
        error = error or (None if source is None else source.error)
        failed = torch.tensor([0 if error is None else 1], dtype=torch.int64, device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
        if failed.item():
            _raise_first(error, group)
    elif error is not None:
        raise error


def gather_from_ranks(task: Callable[[], T], group: Any = None) -> list[T]:
    """The result of every rank's ``task``, in rank order, on every rank; any objects that can be pickled.

    Raises:
        Exception: as :func:`raise_on_all_ranks`.
    """
    result, error = None, None
    try:
        result = task()
    except Exception as caught:
        error = caught
    everyone: list[Any] = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(everyone, (result, error is not None), group=group)
    if any(failed for _, failed in everyone):
        _raise_first(error, group)
    return [value for value, _ in everyone]


def _raise_first(error: BaseException | None, group: Any) -> NoReturn:
    """Called on every rank once one has failed."""
    mine = None if error is None else (dist.get_rank(), isinstance(error, ValueError), str(error))
    everyone: list[Any] = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(everyone, mine, group=group)
    if error is not None:
        raise error
    rank, is_mistake, message = next(entry for entry in everyone if entry is not None)
    raise (ValueError if is_mistake else RankFailedError)(f"rank {rank} failed: {message}")
