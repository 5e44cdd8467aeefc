"""The rows of one split, and what the user is told about them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import datasets

from launch.data.messages import Row

T = TypeVar("T")
_HELD_OUT = 200


@dataclass(frozen=True)
class Rows:
    """The rows of one split and where they came from, for error messages.

    Attributes:
        held_out: the rows were split off the training data for want of test rows.
        unread: names of files or splits of the source that nobody asked for.
        parts: the files that the rows were read from, to which their column `origin` refers.
    """

    source: str
    rows: datasets.Dataset
    held_out: bool = False
    unread: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, index: int) -> str:
        """The file that row `index` of these was read from, and its number there, for messages."""
        origin = self.rows[index].get("origin") if self.parts else None
        if origin is None:
            return f"{self.source}: row {index}"
        return location(self.parts[origin["file"]], origin["row"], origin["line"])

    def take(self, count: int | None) -> Rows:
        """The first `count` rows (all of them for None)."""
        return self if count is None or count >= len(self) else replace(self, rows=self.rows.select(range(count)))

    def leaving(self, *unread: str) -> Rows:
        """The same rows, with more that is not read beside them."""
        return replace(self, unread=(*self.unread, *unread))

    def share(self, count: int | None, option: str) -> str:
        """Which of the rows are used if `option` limits them to `count`, for messages."""
        if count is None or count >= len(self):
            return f"all {len(self)} rows of {self.source}"
        return f"the first {count} of {len(self)} rows of {self.source} ({option})"

    def each(self, action: Callable[[Row], T]) -> Iterator[T]:
        """What `action` makes of each row.

        Raises:
            ValueError: that of the action, with the source and the row.
        """
        for index, row in enumerate(self.rows):
            try:
                yield action(row)
            except ValueError as error:
                raise ValueError(f"{self.where(index)}: {error}") from error


def location(file: str, index: int, line: int | None) -> str:
    """Where a row is in a file, for messages: rows are counted from 0, lines from 1."""
    return f"{file}: row {index}" + ("" if line is None else f" (line {line})")


def split_off_test(rows: Rows) -> dict[str, Rows]:
    """Split off the end of the only rows there are, so that evaluation never sees a training row."""
    held_out = min(_HELD_OUT, len(rows) // 10)
    if held_out == 0:
        return {"train": rows}
    border = len(rows) - held_out
    test = rows.rows.select(range(border, len(rows)))
    return {
        "train": replace(rows, rows=rows.rows.select(range(border))),
        "test": replace(rows, source=f"{rows.source} (rows from {border})", rows=test, held_out=True),
    }


def summary(train: Rows, train_count: int | None, test: Rows | None, test_count: int | None) -> str:
    """One line for the user: what is trained on, what is measured, what is held out, and what is not read.

    Args:
        train_count: how many rows of `train` are used; None for all. `test_count` alike.
    """
    parts = [f"training on {train.share(train_count, '--train_samples')}"]
    if test is None:
        parts.append("nothing is measured")
    else:
        parts.append(f"measuring on {test.share(test_count, '--eval_samples')}")
        if test.held_out:
            parts.append(
                f"these {len(test)} of {len(train) + len(test)} rows are held out of training; name test rows with "
                "--eval_data to train on all"
            )
        elif test.source == train.source:
            parts.append("these are the rows that are trained on")
    return "; ".join(parts) + not_read(train, *([test] if test is not None else []))


def not_read(*several: Rows) -> str:
    """The end of a line for the user: what the sources hold that is not read; "" for nothing."""
    unread = list(dict.fromkeys(name for rows in several for name in rows.unread))
    return f"; not read: {_listed(unread)}" if unread else ""


def _listed(names: list[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
