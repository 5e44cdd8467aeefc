# SPDX-License-Identifier: Apache-2.0
"""Detecting ranks that fell silent, so that the others do not wait for them.

[Note: Heartbeat] When a machine loses power nothing closes its connections. The other ranks then wait in their
collective until the process group's time-out, half an hour by default, and never learn for whom. So a thread on each
rank sends a datagram to rank 0 every ``interval`` seconds, and rank 0 answers it. A rank that is not heard for
``limit`` seconds is lost. Rank 0 tells all others; if rank 0 is the lost one, each finds out by itself. The main
thread cannot be interrupted in a collective, so the process ends at once, with :data:`RANK_LOST`.

Datagrams, not the process group's store: a call to a ``TCPStore`` whose host is gone outlasts any time-out. With 1,024
ranks, they took 2 % of a CPU core on rank 0. Silence is counted in rounds of the listener: if the scheduler suspends
the whole job, or the listener gets no processor, its rounds get longer and nobody is accused. A rank that was never
heard is not accused either, nor one that said that it leaves.
"""

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Iterable
from typing import NoReturn

from deepspeed import comm as dist
from deepspeed.utils import logger

from grass_ds.cluster.channel import Channel

RANK_LOST = 76
"""Exit code of a rank that stopped because another one fell silent."""

LEAVE_SECONDS = 2.0
"""How long a rank that leaves waits for its peers to confirm that they know."""

_TICK = 0.2  # seconds between two looks at whether to leave, and between repetitions of a message
_ALIVE, _LEFT, _LOST = "alive", "left", "lost"


class Silence:
    """How long each peer has been silent, in rounds of the listener; after ``limit`` rounds it is lost."""

    def __init__(self, peers: Iterable[int], limit: int) -> None:
        self.limit = limit
        self.peers = set(peers)  # that have not left
        self.silent: dict[int, int] = {}  # rank -> rounds, of the peers that were heard

    def never_heard(self) -> list[int]:
        return sorted(self.peers - self.silent.keys())

    def heard(self, rank: int) -> None:
        """A sign of life. It may arrive after the rank's message that it leaves."""
        if rank in self.peers:
            self.silent[rank] = -1  # the end of this round makes it 0

    def left(self, rank: int) -> None:
        self.peers.discard(rank)
        self.silent.pop(rank, None)

    def end_round(self) -> list[int]:
        """The lost ranks, sorted; usually none."""
        self.silent = {rank: rounds + 1 for rank, rounds in self.silent.items()}
        if max(self.silent.values(), default=0) < self.limit:
            return []
        # The ranks of a machine die together, but at different points of a round.
        return sorted(rank for rank, rounds in self.silent.items() if rounds >= self.limit - 1)


class Heartbeat:
    """Ends this process when another rank of the run has fallen silent: see [Note: Heartbeat].

        with grass_ds.Heartbeat():
            train()

    All ranks start it, after the process group; with one rank it does nothing. Ranks may leave in any order and at any
    time, by the end of the block or by an exception. If one ends in another way (killed, powered off), the others stop
    within ``limit + 2 * interval`` seconds, with one line on stderr that names the lost ranks and their machines. When
    rank 0 leaves, nobody is watched any longer.

    Args:
        limit: seconds of silence, at least three intervals; more than any call of the program keeps other Python
            threads from running.
        interval: seconds between two signs of life.

    Raises:
        ValueError: one of them is out of its range.
    """

    def __init__(self, limit: float = 120.0, interval: float = 5.0) -> None:
        if interval <= 0:
            raise ValueError(f"interval={interval}: must be above 0 seconds; 5 suits most clusters")
        if limit < 3 * interval:
            raise ValueError(
                f"limit={limit}: must be at least three intervals, {3 * interval:g} seconds, as one message may "
                "get lost; raise it, or lower interval"
            )
        self._interval, self._rounds = interval, math.ceil(limit / interval)
        self._host = socket.gethostname()
        self._silence = Silence((), self._rounds)
        self._thread: threading.Thread | None = None

    def start(self, channel: Channel | None = None) -> None:
        """Begin to listen, by default on a channel of the process group, all of whose ranks call this."""
        if channel is None and dist.get_world_size() == 1:
            return
        self._channel = channel or Channel.open()
        self._silence = Silence(self._channel.peers, self._rounds)
        self._hosts: dict[int, str] = {}
        self._leaving, self._peer_left = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="grass_ds heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave, so that the others wait for no sign: at once if they confirm, else within :data:`LEAVE_SECONDS`."""
        if self._thread is not None:
            self._leaving.set()
            self._thread.join()
            self._thread = None

    def wait_for_cause(self) -> None:
        """After an error in a collective: wait until a lost rank ends this process.

        Returns as soon as a peer has said that it leaves, which explains the error as well, and after at most
        ``limit + 2 * interval`` seconds.
        """
        if self._thread is not None:
            self._peer_left.wait((self._rounds + 2) * self._interval)

    def never_heard(self) -> list[int]:
        """The peers without any sign of life so far. Rank 0 has all others as peers, the others have rank 0."""
        return self._silence.never_heard()

    def __enter__(self) -> "Heartbeat":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        seconds = self._interval * self._channel.rank / self._channel.world_size  # not all ranks send at once
        rounds = 0
        while self._listening():
            if self._channel.rank != 0:
                self._channel.send(_ALIVE, self._host, self._channel.peers)
            self._listen(seconds)
            if lost := self._silence.end_round():
                self._stop_for(lost)
            rounds, seconds = rounds + 1, self._interval
            if rounds == self._rounds and self.never_heard():
                logger.warning(
                    f"heartbeat: nothing heard of ranks {self.never_heard()} so far; if one is lost, "
                    "the others will not notice before the time-out of their collectives. Are UDP packets blocked "
                    "between the machines?"
                )
        self._leave()
        self._channel.close()

    def _listening(self) -> bool:
        return bool(self._silence.peers) and not self._leaving.is_set()

    def _listen(self, seconds: float) -> None:
        """One round."""
        end = time.monotonic() + seconds
        while self._listening():
            message = self._channel.receive(min(end - time.monotonic(), _TICK))
            if message is not None:
                self._process_message(*message)
            # Not before: a message that arrived while this thread got no processor counts for this round.
            elif time.monotonic() >= end:
                return

    def _process_message(self, kind: str, sender: int, text: str) -> None:
        if kind == _LOST:
            self._end_process(text)
        self._hosts[sender] = text
        if kind == _ALIVE:
            self._silence.heard(sender)
        else:
            self._silence.left(sender)
            self._peer_left.set()
        if self._channel.rank == 0 or kind == _LEFT:
            self._channel.send(kind, self._host, [sender])

    def _leave(self) -> None:
        """Tell the peers until each has confirmed, or leaves, too."""
        end = time.monotonic() + LEAVE_SECONDS
        self._channel.send(_LEFT, self._host, self._silence.silent)
        while self._silence.silent and time.monotonic() < end:
            kind, sender, _ = self._channel.receive(_TICK) or ("", 0, "")
            if kind == _LEFT:
                self._silence.left(sender)
            else:
                self._channel.send(_LEFT, self._host, [sender] if kind else self._silence.silent)

    def _stop_for(self, lost: list[int]) -> NoReturn:
        names = ", ".join(f"rank {rank} on host {self._hosts[rank]}" for rank in lost)
        seconds = self._rounds * self._interval
        text = f"lost: {names}; silent for {seconds:g} s, so the process is gone or its machine is."
        if self._channel.rank == 0:
            for _ in range(3):  # datagrams may get lost
                self._channel.send(_LOST, text, self._channel.peers)
                time.sleep(_TICK)
        self._end_process(text)

    def _end_process(self, text: str) -> NoReturn:
        line = (
            f"grass_ds: {text} Rank {self._channel.rank} on host {self._host} stops with exit code {RANK_LOST}; "
            "the job can be resumed from its last checkpoint.\n"
        )
        # Not by a stream, whose lock the main thread may hold. The process ends even if nobody reads any more.
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        os._exit(RANK_LOST)
