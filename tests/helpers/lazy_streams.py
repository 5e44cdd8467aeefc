# SPDX-License-Identifier: Apache-2.0
"""An accelerator with streams, played on the CPU by one that puts everything off.

What is computed happens at once. A copy is only queued on its stream, and runs at the last moment that its waits
allow: when somebody waits for an event that it precedes. Whoever forgets to wait therefore finds old data, every time
and not once in a thousand runs.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from grass_ds.offload.copies import Copies, Pairs
from grass_ds.offload.trace import Trace

POISON = float("nan")


@dataclass(eq=False)
class Event:
    """The end of a queued copy; without one, of what was computed until then, which is done.

    Attributes:
        lane: stream of the copy, ``load`` or ``store``; None for compute.
        pairs: (target, source) of the copy.
        after: events that it waits for.
        ordered: whether it waits for anything at all.
    """

    copies: "LazyCopies"
    lane: str | None = None
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    after: list["Event"] = field(default_factory=list)
    ordered: bool = True
    done: bool = False

    def synchronize(self) -> None:
        """The host waits."""
        if self.copies.host_waits(self):
            self.copies.run(self)


class LazyCopies(Copies):
    """See above. A copy that waits for nothing is not ordered against compute either: what it delivers is made
    unusable.

    The methods ``copy_waits``, ``compute_waits`` and ``host_waits`` say which waits are honoured: all of them, unless
    overridden.
    """

    def __init__(self, trace: Trace):
        super().__init__(trace)
        self._queues: dict[str, deque[Event]] = {"load": deque(), "store": deque()}
        self._lock = threading.RLock()
        self.copied = 0

    def copy_waits(self, lane: str, event: Event) -> bool:
        """Whether a copy on ``lane`` waits for ``event``."""
        return True

    def compute_waits(self, event: Event) -> bool:
        """Whether compute waits for ``event``."""
        return True

    def host_waits(self, event: Event) -> bool:
        """Whether the calling thread waits for ``event``."""
        return True

    def compute_waits_for(self, event: Event | None) -> None:
        if event is not None and self.compute_waits(event):
            self.run(event)

    def compute_event(self) -> Event:
        return Event(self, done=True)

    def run(self, event: Event) -> None:
        """Do the copy that ends with ``event``, and all that come before it."""
        with self._lock:
            while not event.done:
                assert event.lane is not None
                queue = self._queues[event.lane]
                for earlier in queue[0].after:
                    self.run(earlier)
                self._run_copy(queue.popleft())

    def _copy(self, pairs: Pairs, after: Sequence[Any], lane: str, name: str) -> Event:
        honoured = [event for event in after if event is not None and self.copy_waits(lane, event)]
        with self._lock:
            event = Event(self, lane, list(pairs), honoured, ordered=bool(honoured))
            self._queues[lane].append(event)
        return event

    @torch.no_grad()
    def _run_copy(self, event: Event) -> None:
        for target, source in event.pairs:
            target.copy_(source if event.ordered else torch.full_like(source, POISON))
            self.copied += 1
        event.pairs, event.after, event.done = [], [], True
