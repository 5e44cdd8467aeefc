# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device, on streams of their own where the accelerator has streams.

[Note: Ordering] Three streams touch a device buffer: loads (host to device), compute, stores (device to host). Each
copy waits for the events it is given and ends with an event; nothing else orders them. ``record_stream`` tells the
allocator not to hand out memory of the compute stream again while a copy on another one still runs. On a synchronous
accelerator (the CPU) events are ``None``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.offload.trace import Trace

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""(target, source) tensors of equal shape."""


class Copies:
    """Copies that are done when the call returns; the host waits for the events they are given."""

    def __init__(self, trace: Trace):
        self.trace = trace

    def load(self, pairs: Pairs, after: Sequence[Any], name: str) -> Any:
        """Host to device after the events ``after``; returns the event it ends with."""
        return self._copy(pairs, after, "load", name)

    def store(self, pairs: Pairs, after: Sequence[Any], name: str) -> Any:
        """Device to host, likewise."""
        return self._copy(pairs, after, "store", name)

    def compute_waits_for(self, event: Any) -> None:
        """What is computed from here on comes after ``event``."""

    def compute_event(self) -> Any:
        """The event of everything computed so far."""
        return None

    def enter_thread(self) -> None:
        """Every thread that issues copies calls this first."""

    def _copy(self, pairs: Pairs, after: Sequence[Any], lane: str, name: str) -> Any:
        synchronize(after)
        with self.trace.span(lane, name):
            for target, source in pairs:
                target.copy_(source)
        return None


class StreamCopies(Copies):
    """Copies on two side streams, one per direction: they overlap with compute and with each other."""

    def __init__(self, trace: Trace, device: torch.device):
        super().__init__(trace)
        self._device = device
        self._streams = {lane: get_accelerator().Stream() for lane in ("load", "store")}

    def compute_waits_for(self, event: Any) -> None:
        if event is not None:
            get_accelerator().current_stream().wait_event(event)

    def compute_event(self) -> Any:
        return _event(get_accelerator().current_stream())

    def enter_thread(self) -> None:
        get_accelerator().set_device(self._device.index or 0)

    def _copy(self, pairs: Pairs, after: Sequence[Any], lane: str, name: str) -> Any:
        stream = self._streams[lane]
        with get_accelerator().stream(stream), self.trace.span(lane, name, stream):
            for event in after:
                if event is not None:
                    stream.wait_event(event)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                (target if target.device.type != "cpu" else source).record_stream(stream)
            return _event(stream)


def copies_for(device: torch.device, trace: Trace) -> Copies:
    if get_accelerator().is_synchronized_device() or device.type == "cpu":
        return Copies(trace)
    return StreamCopies(trace, device)


def synchronize(events: Iterable[Any]) -> None:
    """The host waits for the events."""
    for event in events:
        if event is not None:
            event.synchronize()


def _event(stream: Any) -> Any:
    event = get_accelerator().Event()
    event.record(stream)
    return event
