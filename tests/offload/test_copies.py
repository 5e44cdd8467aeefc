# SPDX-License-Identifier: Apache-2.0
"""Copies on streams: what they wait for, and what waits for them. The accelerator is played by one that writes down."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grass_ds.offload import copies
from grass_ds.offload.trace import Trace


class Accelerator:
    """Writes down in ``calls`` what happens on which stream; ``current`` is that of compute outside of a block."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.streams = 0
        self.current = self.Stream("compute")

    def Stream(self, name: str | None = None) -> Any:
        self.streams += name is None
        name = name or ("load", "store")[self.streams - 1]
        return SimpleNamespace(name=name, wait_event=lambda event: self.calls.append((name, "waits for", event)))

    def Event(self) -> Any:
        event = SimpleNamespace()
        event.record = lambda stream: self.calls.append((stream.name, "records", event))
        return event

    def current_stream(self) -> Any:
        return self.current

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def tensor(self, device: str) -> Any:
        def copy(source: Any, non_blocking: bool) -> None:
            assert non_blocking
            self.calls.append((self.current.name, "copies", source))

        used = lambda stream: self.calls.append((stream.name, "keeps", device))  # noqa: E731
        return SimpleNamespace(device=torch.device(device), copy_=copy, record_stream=used)


@pytest.mark.parametrize("lane", ["load", "store"])
def test_a_copy_waits_and_is_waited_for(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator()
    monkeypatch.setattr(copies, "get_accelerator", lambda: accelerator)
    streams = copies.StreamCopies(Trace(None, 0), torch.device("cuda", 0))
    here, there = accelerator.tensor("cuda"), accelerator.tensor("cpu")
    pairs = [(here, there) if lane == "load" else (there, here)]
    computed = streams.compute_event()
    event = getattr(streams, lane)(pairs, [computed, None, "earlier"], "chunk")
    streams.compute_waits_for(None)
    streams.compute_waits_for(event)
    assert accelerator.calls == [
        ("compute", "records", computed),
        (lane, "waits for", computed),
        (lane, "waits for", "earlier"),
        (lane, "copies", pairs[0][1]),
        (lane, "keeps", "cuda"),
        (lane, "records", event),
        ("compute", "waits for", event),
    ]
