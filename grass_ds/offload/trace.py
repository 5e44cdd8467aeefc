# SPDX-License-Identifier: Apache-2.0
"""A Chrome trace (load it in ``chrome://tracing`` or Perfetto) of transfers beside backward and step.

[Note: Not torch.profiler] It does not see spans of the I/O threads, and it records every operator of a run: 100 KB for
a step of a single matrix product. There can be only one at a time, which the user may need.
"""

import atexit
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

LANES = ("backward", "step", "read", "write", "load", "store")
"""Rows: the training thread, the disk, and copies to and from the device (on streams, by device time)."""
MAX_SPANS = 200_000
"""Spans kept: the first ones, since the start of a run shows what there is to see."""


class Trace:
    """Spans of this rank, written to ``path`` with ``.rank<r>`` before its suffix; None: no trace, at no cost."""

    def __init__(self, path: str | None, rank: int = 0):
        self._path: Path | None = None
        self._rank, self._start = rank, time.perf_counter()
        # Lane, name, begin and end. The ends are seconds since the start, or events on a stream.
        self._spans: list[tuple[str, str, Any, Any]] = []
        self._reference: tuple[Any, float] | None = None  # one moment as an event and in seconds
        self._begun: dict[str, Any] = {}
        if path is not None:
            whole = Path(os.path.expandvars(path)).expanduser()
            self._path = whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix or '.json'}")
            atexit.register(self.write)

    @contextmanager
    def span(self, lane: str, name: str, stream: Any = None) -> Iterator[None]:
        """Time the body on the host, or its work on ``stream``."""
        begin = self._moment(stream)
        try:
            yield
        finally:
            self._add(lane, name, begin, self._moment(stream))

    def begin(self, lane: str) -> None:
        """Begin the lane's span, unless one has begun."""
        self._begun.setdefault(lane, self._moment())

    def end(self, lane: str, name: str) -> None:
        """End the lane's span, if one has begun."""
        begin = self._begun.pop(lane, None)
        if begin is not None:
            self._add(lane, name, begin, self._moment())

    def write(self) -> None:
        """Write the file. If that fails, the run goes on with a warning."""
        if self._path is None:
            return
        atexit.unregister(self.write)
        if self._reference is not None:
            get_accelerator().synchronize()
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": self._rank, "tid": row, "args": {"name": lane}}
            for row, lane in enumerate(LANES)
        ]
        for lane, name, *ends in self._spans:
            begin, end = (self._seconds(moment) * 1e6 for moment in ends)
            times = {"ts": begin, "dur": end - begin}
            events.append({"ph": "X", "name": name, "pid": self._rank, "tid": LANES.index(lane), **times})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        except OSError as error:
            logger.warning(f"grass.offload.trace: could not write {self._path}: {error}")

    def _moment(self, stream: Any = None) -> Any:
        if self._path is None or len(self._spans) >= MAX_SPANS:
            return 0.0
        if stream is None:
            return time.perf_counter() - self._start
        if self._reference is None:
            get_accelerator().synchronize()  # on an idle device an event happens when it is recorded
            self._reference = (_timed_event(stream), time.perf_counter() - self._start)
        return _timed_event(stream)

    def _add(self, lane: str, name: str, begin: Any, end: Any) -> None:
        if self._path is not None and len(self._spans) < MAX_SPANS:
            self._spans.append((lane, name, begin, end))

    def _seconds(self, moment: Any) -> float:
        if isinstance(moment, float):
            return moment
        assert self._reference is not None
        event, seconds = self._reference
        return seconds + event.elapsed_time(moment) / 1e3


def _timed_event(stream: Any) -> Any:
    event = get_accelerator().Event(enable_timing=True)
    event.record(stream)
    return event
