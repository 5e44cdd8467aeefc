# SPDX-License-Identifier: Apache-2.0
"""What moved when: a Chrome trace (load it in ``chrome://tracing`` or Perfetto) of transfers beside backward and step."""

import atexit
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

MAX_SPANS = 200_000
"""Spans kept; the first ones, since the start of a run shows what there is to see."""


class Trace:
    """Spans of this rank, written as Chrome-trace JSON by :meth:`write`; costs nothing without a path.

    Lanes are the rows of the picture: ``backward`` and ``step`` (the training thread), ``read`` and ``write`` (disk), ``load`` and
    ``store`` (copies to and from the device; on streams, by device time).

    Args:
        path: file to write; ``{rank}`` in it is replaced, otherwise ``.rank<r>`` goes before the suffix. None: no trace.
    """

    def __init__(self, path: str | None, rank: int = 0):
        self._path = _of_rank(path, rank) if path is not None else None
        self._rank = rank
        self._spans: list[tuple[str, str, float, float]] = []
        self._on_device: list[tuple[str, str, Any, Any]] = []
        self._open: dict[str, float] = {}
        self._lock = threading.Lock()
        self._zero = time.perf_counter()
        self._device_zero: Any = None
        if path is not None:
            atexit.register(self.write)

    @property
    def path(self) -> Path | None:
        """The file of this rank."""
        return self._path

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        """Time the body on the host."""
        if self._path is None:
            yield
            return
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._keep(lane, name, begin, time.perf_counter())

    @contextmanager
    def device_span(self, lane: str, name: str, stream: Any) -> Iterator[None]:
        """Time the body's work on ``stream``, by events."""
        if self._path is None or len(self._on_device) >= MAX_SPANS:
            yield
            return
        with self._lock:
            if self._device_zero is None:
                self._synchronise_clocks()
        begin, end = (get_accelerator().Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        self._on_device.append((lane, name, begin, end))

    def begin(self, lane: str) -> None:
        """Open the lane's span, if it is not open."""
        if self._path is not None:
            self._open.setdefault(lane, time.perf_counter())

    def end(self, lane: str, name: str) -> None:
        """Close the lane's span, if it is open."""
        begin = self._open.pop(lane, None)
        if begin is not None:
            self._keep(lane, name, begin, time.perf_counter())

    def write(self) -> None:
        """Write the file; called at the end of a run. A trace that cannot be written costs a warning, not the run."""
        if self._path is None:
            return
        atexit.unregister(self.write)
        lanes = sorted({lane for lane, *_ in (*self._spans, *self._on_device)})
        rows: list[dict[str, Any]] = [
            {"ph": "M", "name": "thread_name", "pid": self._rank, "tid": lanes.index(lane), "args": {"name": lane}}
            for lane in lanes
        ]
        for lane, name, begin, length in (*self._host_rows(), *self._device_rows()):
            rows.append(
                {"ph": "X", "name": name, "pid": self._rank, "tid": lanes.index(lane), "ts": begin, "dur": length}
            )
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"traceEvents": rows, "displayTimeUnit": "ms"}))
        except OSError as error:
            logger.warning(f"grass.offload.trace: could not write {self._path}: {error}")

    def _keep(self, lane: str, name: str, begin: float, end: float) -> None:
        with self._lock:
            if len(self._spans) < MAX_SPANS:
                self._spans.append((lane, name, begin, end))

    def _host_rows(self) -> Iterator[tuple[str, str, float, float]]:
        for lane, name, begin, end in self._spans:
            yield lane, name, (begin - self._zero) * 1e6, (end - begin) * 1e6

    def _device_rows(self) -> Iterator[tuple[str, str, float, float]]:
        if self._on_device:
            get_accelerator().synchronize()
        for lane, name, begin, end in self._on_device:
            yield (
                lane,
                name,
                self._device_offset + self._device_zero.elapsed_time(begin) * 1e3,
                begin.elapsed_time(end) * 1e3,
            )

    def _synchronise_clocks(self) -> None:
        """Tie the device's clock to the host's: an event recorded on an idle device."""
        get_accelerator().synchronize()
        self._device_zero = get_accelerator().Event(enable_timing=True)
        self._device_zero.record()
        self._device_offset = (time.perf_counter() - self._zero) * 1e6


def _of_rank(path: str, rank: int) -> Path:
    if "{rank}" in path:
        return Path(path.replace("{rank}", str(rank)))
    whole = Path(os.path.expandvars(path)).expanduser()
    return whole.with_name(f"{whole.stem}.rank{rank}{whole.suffix or '.json'}")
