# SPDX-License-Identifier: Apache-2.0
"""Copies between host and device, on streams of their own where the accelerator has streams.

[Note: Ordering] Three streams touch a device buffer: loads (host to device), compute, stores (device to host). Each copy waits for the
events it is given and ends with an event; nothing else orders them. ``join`` lets the compute stream wait, ``mark`` is the event of
what the compute stream was given so far. Memory allocated under the compute stream and used by another one is told to the
allocator (``record_stream``), which otherwise would hand it out again while a copy still runs.

A synchronous accelerator (the CPU) takes the same path with ``None`` for events.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from grass_ds.offload.trace import Trace

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""(target, source) tensors of equal shape."""


class Copies:
    """Copies that are done when the call returns; given events are waited for on the host."""

    def __init__(self, trace: Trace):
        self._trace = trace

    def load(self, pairs: Pairs, after: Sequence[Any], name: str) -> Any:
        """Host to device; returns the event it ends with."""
        return self._now(pairs, after, "load", name)

    def store(self, pairs: Pairs, after: Sequence[Any], name: str) -> Any:
        """Device to host; returns the event it ends with."""
        return self._now(pairs, after, "store", name)

    def join(self, event: Any) -> None:
        """What is computed from here on comes after ``event``."""

    def mark(self) -> Any:
        """The event of everything computed so far."""
        return None

    def enter_thread(self) -> None:
        """To be called first in a thread that issues copies."""

    def _now(self, pairs: Pairs, after: Sequence[Any], lane: str, name: str) -> Any:
        for event in after:
            if event is not None:
                event.synchronize()
        with self._trace.span(lane, name):
            for target, source in pairs:
                target.copy_(source)
        return None


class StreamCopies(Copies):
    """Copies on two side streams, one per direction: they overlap with compute and with each other."""

    def __init__(self, trace: Trace, device: torch.device):
        super().__init__(trace)
        self._device = device
        self._loads, self._stores = get_accelerator().Stream(), get_accelerator().Stream()

    def load(self, pairs: Pairs, after: Sequence[Any], name: str) -> Any:
        return self._on(self._loads, pairs, after, "load", name)

    def store(self, pairs: Pairs, after: Sequence[Any], name: str) -> Any:
        return self._on(self._stores, pairs, after, "store", name)

    def join(self, event: Any) -> None:
        if event is not None:
            get_accelerator().current_stream().wait_event(event)

    def mark(self) -> Any:
        event = get_accelerator().Event()
        event.record(get_accelerator().current_stream())
        return event

    def enter_thread(self) -> None:
        get_accelerator().set_device(self._device.index or 0)

    def _on(self, stream: Any, pairs: Pairs, after: Sequence[Any], lane: str, name: str) -> Any:
        with get_accelerator().stream(stream), self._device_span(stream, lane, name):
            for event in after:
                if event is not None:
                    stream.wait_event(event)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                (target if target.device.type != "cpu" else source).record_stream(stream)
            event = get_accelerator().Event()
            event.record(stream)
        return event

    def _device_span(self, stream: Any, lane: str, name: str) -> AbstractContextManager[None]:
        return self._trace.device_span(lane, name, stream)


def copies_for(device: torch.device, trace: Trace) -> Copies:
    """The copies that suit the accelerator."""
    if get_accelerator().is_synchronized_device() or device.type == "cpu":
        return Copies(trace)
    return StreamCopies(trace, device)
