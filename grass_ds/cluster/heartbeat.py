# SPDX-License-Identifier: Apache-2.0
"""Noticing ranks that fell silent, so that the others do not wait for them.

[Note: Heartbeat] When a machine loses power nothing closes its connections. The other ranks then wait in their collective until the process
group's time-out, half an hour by default, and never learn whom for. So a thread on each rank sends a datagram to rank 0 every ``interval``
seconds, and rank 0 answers it. Whoever is not heard for ``limit`` seconds is lost: rank 0 tells all others, or each finds out by itself if it is
rank 0 that does not answer. The main thread cannot be interrupted in a collective, so the process ends on the spot, with :data:`RANK_LOST`.

Datagrams, not the process group's store: a call to a ``TCPStore`` whose host is gone outlasts any time-out, and that silence is what is to be
noticed here. One socket per rank, no connection: at 1,024 ranks rank 0 gets and sends 205 datagrams of about 60 bytes per second, which took
2 % of a CPU core.

Silence is counted in the rounds of the one who listens. A job that the scheduler suspends as a whole, or a listener that gets no processor, thus
accuses nobody: its rounds get longer instead. Nor is a rank accused that has never been heard, or one that said that it leaves.
"""

import contextlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NoReturn

from deepspeed import comm as dist
from deepspeed.utils import logger

RANK_LOST = 76
"""Exit code of a rank that stopped because another one fell silent."""

FAREWELL = 2.0
"""Seconds for which a rank that leaves waits for its peers to hear of it."""

_TICK = 0.2  # seconds between two looks at whether to leave, and between repetitions of what must arrive
_BEAT, _LEFT, _LOST = "beat", "left", "lost"


class Silence:
    """How long each peer has been silent, in rounds of the listener.

    Args:
        peers: ranks to listen for.
        rounds: after how many rounds without a sign a peer is lost.
    """

    def __init__(self, peers: Iterable[int], rounds: int) -> None:
        self.rounds = rounds
        self.never_heard = set(peers)
        self._left: set[int] = set()
        self._silent: dict[int, int] = {}

    def heard(self, rank: int) -> None:
        """A sign of life. Of one that has left it is a late one."""
        self.never_heard.discard(rank)
        if rank not in self._left:
            self._silent[rank] = -1  # the end of this round makes it 0

    def left(self, rank: int) -> None:
        """The peer said that it leaves."""
        self.never_heard.discard(rank)
        self._silent.pop(rank, None)
        self._left.add(rank)

    def listening(self) -> bool:
        """Whether there is anybody left to listen for."""
        return bool(self.never_heard or self._silent)

    def watched(self) -> list[int]:
        """Those who were heard and have not left."""
        return list(self._silent)

    def end_round(self) -> list[int]:
        """Who is lost, sorted; mostly nobody."""
        self._silent = {rank: rounds + 1 for rank, rounds in self._silent.items()}
        if max(self._silent.values(), default=0) < self.rounds:
            return []
        # The ranks of a machine die together, but not at the same point of a round.
        return sorted(rank for rank, rounds in self._silent.items() if rounds >= self.rounds - 1)


class Line:
    """A rank's end of the conversation with rank 0.

    Args:
        rank, world_size: who speaks, of how many.
        address: name and UDP port of rank 0.
        token: what every message begins with, so that a stranger's is not taken for one.
        own: the bound socket of rank 0; the others make theirs.
    """

    def __init__(
        self, rank: int, world_size: int, address: tuple[str, int], token: str, own: socket.socket | None = None
    ) -> None:
        family, _, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        self.rank = rank
        self.peers = range(1, world_size) if rank == 0 else range(1)
        self.phase = rank / world_size
        self._token = token.encode()
        self._socket = own or socket.socket(family, socket.SOCK_DGRAM)
        self._addresses: dict[int, Any] = {} if rank == 0 else {0: target}

    @classmethod
    def meet(cls) -> "Line":
        """Open a line on every rank of the process group: one broadcast of a small object."""
        rank = dist.get_rank()
        own = bound_socket() if rank == 0 else None
        address = (os.environ.get("MASTER_ADDR", socket.gethostname()), own.getsockname()[1] if own else 0)
        shared = [(address, secrets.token_hex(8))]
        dist.broadcast_object_list(shared, src=0)
        return cls(rank, dist.get_world_size(), *shared[0], own)

    def send(self, kind: str, text: str, to: Iterable[int]) -> None:
        """Send to those peers whose address is known. What does not get through counts as silence."""
        message = self._token + json.dumps([kind, self.rank, text]).encode()
        for peer in to:
            if peer in self._addresses:
                with contextlib.suppress(OSError):
                    self._socket.sendto(message, self._addresses[peer])

    def receive(self, seconds: float) -> tuple[str, int, str] | None:
        """The next message if one comes within that time: kind, sender, text."""
        self._socket.settimeout(max(seconds, 0.0))
        try:
            data, address = self._socket.recvfrom(1 << 16)
        except (TimeoutError, BlockingIOError):
            return None
        if not data.startswith(self._token):
            return None
        kind, sender, text = json.loads(data[len(self._token) :])
        if self.rank == 0:
            self._addresses[sender] = address
        return kind, sender, text

    def close(self) -> None:
        self._socket.close()


def bound_socket() -> socket.socket:
    """A UDP socket on a free port of all interfaces, IPv6 and IPv4 where there are both."""
    both = socket.has_dualstack_ipv6()
    own = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_DGRAM)
    if both:
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # A message of each rank of a large run, and more, while this process keeps its threads from running; the system may grant less.
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    own.bind(("", 0))
    return own


class Heartbeat:
    """Ends this process when another rank of the run has fallen silent: see [Note: Heartbeat].

        with grass_ds.Heartbeat():
            train()

    All ranks start it, after the process group. Ranks may leave in any order and at any time, by the end of the block or by an exception; one
    that ends in another way (killed, powered off) is lost. With one rank it does nothing. Survivors stop within ``limit + 2 * interval`` seconds,
    with one line on stderr that names the missing ranks and their machines. If rank 0 leaves, nobody is watched any longer.

    Args:
        limit: seconds of silence, at least three intervals; more than any call of the program keeps other Python threads from running.
        interval: seconds between two signs of life.

    Raises:
        ValueError: of these two, one is out of its range.
    """

    def __init__(self, limit: float = 120.0, interval: float = 5.0) -> None:
        if interval <= 0:
            raise ValueError(f"interval={interval}: must be above 0 seconds; 5 suits most clusters")
        if limit < 3 * interval:
            raise ValueError(
                f"limit={limit}: must be at least three intervals, {3 * interval:g} seconds, as one message may get lost; "
                "raise it, or lower interval"
            )
        self._interval = interval
        self._rounds = math.ceil(limit / interval)
        self._departure = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to listen. Call it on all ranks of the process group."""
        if dist.get_world_size() > 1:
            self.listen(Line.meet())

    def listen(self, line: Line) -> None:
        """Begin to listen on a line that is open already."""
        self._line = line
        self._silence = Silence(line.peers, self._rounds)
        self._hosts: dict[int, str] = {}
        self._host = socket.gethostname()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="grass_ds heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Leave, so that the others do not wait for a sign: at once if they hear it, within :data:`FAREWELL` seconds otherwise."""
        if self._thread is not None:
            self._leaving.set()
            self._thread.join()
            self._thread = None

    def wait_for_verdict(self) -> None:
        """After an error in a collective: learn whether a lost rank was the reason, which ends this process with its name.

        Returns as soon as a peer has said that it leaves, which explains the error as well, or when nobody can be lost any more: after at
        most ``limit + 2 * interval`` seconds.
        """
        if self._thread is not None:
            self._departure.wait((self._rounds + 2) * self._interval)

    def __enter__(self) -> "Heartbeat":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # ---- the thread --------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        seconds = self._interval * self._line.phase  # spreads the ranks' beats over an interval
        rounds = 0
        while self._staying():
            if self._line.rank != 0:
                self._line.send(_BEAT, self._host, self._line.peers)
            self._hear(seconds)
            if lost := self._silence.end_round():
                self._give_up(lost)
            rounds, seconds = rounds + 1, self._interval
            if rounds == self._rounds and self._silence.never_heard:
                self._warn()
        self._leave()
        self._line.close()

    def _staying(self) -> bool:
        return self._silence.listening() and not self._leaving.is_set()

    def _hear(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self._staying():
            message = self._line.receive(min(end - time.monotonic(), _TICK))
            if message is not None:
                self._take(*message)
            # Not before: what has arrived while this thread got no processor counts for this round.
            elif time.monotonic() >= end:
                return

    def _take(self, kind: str, sender: int, text: str) -> None:
        if kind == _LOST:
            self._end(text)
        self._hosts[sender] = text
        if kind == _BEAT:
            self._silence.heard(sender)
        else:
            self._silence.left(sender)
            self._departure.set()
        if self._line.rank == 0 or kind == _LEFT:
            self._line.send(kind, self._host, [sender])

    def _leave(self) -> None:
        """Tell those who are still there, until each has said the same."""
        end = time.monotonic() + FAREWELL
        self._line.send(_LEFT, self._host, self._silence.watched())
        while self._silence.watched() and time.monotonic() < end:
            kind, sender, _ = self._line.receive(_TICK) or ("", 0, "")
            if kind == _LEFT:
                self._silence.left(sender)
            else:
                self._line.send(_LEFT, self._host, [sender] if kind else self._silence.watched())

    def _warn(self) -> None:
        logger.warning(
            f"heartbeat: nothing heard of ranks {sorted(self._silence.never_heard)} so far; if one is lost, the others will not notice before the "
            "time-out of their collectives. Are UDP packets blocked between the machines?"
        )

    # ---- the end -----------------------------------------------------------------------------------------------------------

    def _give_up(self, lost: list[int]) -> NoReturn:
        by_host: dict[str, list[str]] = {}
        for rank in lost:
            by_host.setdefault(self._hosts[rank], []).append(str(rank))
        who = "; ".join(
            f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)} on host {host}" for host, ranks in by_host.items()
        )
        text = (
            f"lost: {who}; silent for {self._rounds * self._interval:g} s, so the process is gone or its machine is."
        )
        if self._line.rank == 0:
            for _ in range(3):  # datagrams may get lost
                self._line.send(_LOST, text, self._line.peers)
                time.sleep(_TICK)
        self._end(text)

    def _end(self, text: str) -> NoReturn:
        line = (
            f"grass_ds: {text} Rank {self._line.rank} on host {self._host} stops with exit code {RANK_LOST}; the job can be resumed from its last "
            "checkpoint.\n"
        )
        # Not by a stream, whose lock the main thread may hold; and end though nobody reads any more.
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        os._exit(RANK_LOST)
