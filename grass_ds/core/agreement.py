# SPDX-License-Identifier: Apache-2.0
"""Ranks decide alike, and fail together.

Ranks that train different layers mix their gradients without an error: so decisions are compared before they take
effect. An error on one rank is raised on every rank, or the others would wait for it in their next collective.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from deepspeed import comm as dist

T = TypeVar("T")


class RankDivergenceError(RuntimeError):
    """Ranks of one run made different decisions."""


def digest(*values: object) -> int:
    """A 62-bit number that differs when the values' ``repr`` differ."""
    return int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:8], "big") >> 2


def check_ranks_agree(
    fingerprint: Sequence[int], what: str, group: Any, device: torch.device | str, fields: Sequence[str] = ()
) -> None:
    """Compare ``fingerprint`` (ints in 0 .. 2**62) across ``group``: one all-reduce of 2 x len(fingerprint) int64.

    Raises:
        RankDivergenceError: on every rank, if any rank holds another value; it names those of ``fields`` that differ.
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
    """Something that moves state. ``fallible``: one rank alone can fail. ``error``: the first error of its threads."""

    @property
    def fallible(self) -> bool: ...

    @property
    def error(self) -> BaseException | None: ...


@contextmanager
def raise_on_all_ranks(group: Any, device: torch.device | str, source: Fallible | None = None) -> Iterator[None]:
    """If the block fails on any rank, raise on every rank at its end. The block must not contain collectives.

    One all-reduce of one int64. Messages are exchanged only if a rank failed.

    Args:
        source: its threads' errors count, too. If it is not fallible (on any rank), there are no collectives.

    Raises:
        Exception: on a rank that failed, its own error. On the others a ValueError if the lowest failed rank's is one,
            which is a user's mistake, else RankFailedError.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if source is None or source.fallible:
        error = error or (None if source is None else source.error)
        failed = torch.tensor([error is not None], dtype=torch.int64, device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
        if failed.item():
            _gather(None, error, group)
    elif error is not None:
        raise error


def gather_from_ranks(task: Callable[[], T], group: Any = None) -> list[T]:
    """The (picklable) results of ``task`` on all ranks, in rank order. Raises as :func:`raise_on_all_ranks`."""
    result, error = None, None
    try:
        result = task()
    except Exception as caught:
        error = caught
    return _gather(result, error, group)


def _gather(result: Any, error: BaseException | None, group: Any) -> list[Any]:
    """Exchange results, or raise on every rank."""
    failure = None if error is None else (dist.get_rank(), isinstance(error, ValueError), str(error))
    everyone: list[Any] = [None] * dist.get_world_size(group=group)
    dist.all_gather_object(everyone, (result, failure), group=group)
    if error is not None:
        raise error
    failures = [failed for _, failed in everyone if failed is not None]
    if failures:
        rank, is_mistake, message = failures[0]
        raise (ValueError if is_mistake else RankFailedError)(f"rank {rank} failed: {message}")
    return [value for value, _ in everyone]
