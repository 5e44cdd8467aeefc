# SPDX-License-Identifier: Apache-2.0
"""A Chrome trace (load it in ``chrome://tracing`` or Perfetto) of transfers beside backward and step.

[Note: Not torch.profiler] It does not see spans of the I/O threads, records every operator of a run (100 KB for a step
of a single matrix product), and there can be only one at a time, which the user may need.
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
    """Spans of this rank, written by :meth:`write` and at exit; costs nothing without a path.

    Args:
        path: file to write; ``{rank}`` in it is replaced, otherwise ``.rank<r>`` goes before the suffix. None: no
            trace.

    Attributes:
        path: the file of this rank.
    """

    def __init__(self, path: str | None, rank: int = 0):
        self.path = None if path is None else _path_of_rank(path, rank)
        self._rank, self._start = rank, time.perf_counter()
        self._spans: list[tuple[str, str, float, float]] = []  # lane, name, begin and end in seconds since the start
        self._device_spans: list[tuple[str, str, Any, Any]] = []  # lane, name, begin and end as events
        self._device_start: tuple[Any, float] | None = None  # one moment as an event and in seconds
        self._begun: dict[str, float] = {}
        if path is not None:
            atexit.register(self.write)

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """Time the body on the host."""
        begin = self._now()
        try:
            yield
        finally:
            self._add(lane, name, begin)

    def begin(self, lane: str) -> None:
        """Begin the lane's span, unless one has begun."""
        self._begun.setdefault(lane, self._now())

    def end(self, lane: str, name: str) -> None:
        """End the lane's span, if one has begun."""
        begin = self._begun.pop(lane, None)
        if begin is not None:
            self._add(lane, name, begin)

    @contextmanager
    def device_span(self, lane: str, name: str, stream: Any) -> Iterator[None]:
        """Time the body's work on ``stream``."""
        if self.path is None or len(self._device_spans) >= MAX_SPANS:
            yield
            return
        if self._device_start is None:
            get_accelerator().synchronize()  # on an idle device an event happens when it is recorded
            event = _timed_event(get_accelerator().current_stream())
            self._device_start = (event, self._now())
        begin = _timed_event(stream)
        yield
        self._device_spans.append((lane, name, begin, _timed_event(stream)))

    def write(self) -> None:
        """Write the file. If that fails, the run goes on with a warning."""
        if self.path is None:
            return
        atexit.unregister(self.write)
        events: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": self._rank, "tid": row, "args": {"name": lane}}
            for row, lane in enumerate(LANES)
        ]
        for lane, name, begin, end in (*self._spans, *self._host_times()):
            times = {"ts": begin * 1e6, "dur": (end - begin) * 1e6}
            events.append({"ph": "X", "name": name, "pid": self._rank, "tid": LANES.index(lane), **times})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        except OSError as error:
            logger.warning(f"grass.offload.trace: could not write {self.path}: {error}")

    def _now(self) -> float:
        return time.perf_counter() - self._start

    def _add(self, lane: str, name: str, begin: float) -> None:
        if self.path is not None and len(self._spans) < MAX_SPANS:
            self._spans.append((lane, name, begin, self._now()))

    def _host_times(self) -> Iterator[tuple[str, str, float, float]]:
        """The device's spans in seconds since the start."""
        if self._device_start is None:
            return
        get_accelerator().synchronize()
        event, offset = self._device_start
        for lane, name, *ends in self._device_spans:
            begin, end = (offset + event.elapsed_time(moment) / 1e3 for moment in ends)
            yield lane, name, begin, end


def _timed_event(stream: Any) -> Any:
    event = get_accelerator().Event(enable_timing=True)
    event.record(stream)
    return event


def _path_of_rank(path: str, rank: int) -> Path:
    if "{rank}" in path:
        return Path(path.replace("{rank}", str(rank)))
    expanded = Path(os.path.expandvars(path)).expanduser()
    return expanded.with_name(f"{expanded.stem}.rank{rank}{expanded.suffix or '.json'}")
