# SPDX-License-Identifier: Apache-2.0
"""Datagrams between the ranks of a run."""

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Iterable
from typing import Any

from deepspeed import comm as dist


class Channel:
    """Datagrams between this rank and rank 0.

    Args:
        address: host name and UDP port of rank 0.
        token: prefix of every message, which keeps out those of other programs.
        own: the bound socket of rank 0; other ranks make theirs.
    """

    def __init__(
        self, rank: int, world_size: int, address: tuple[str, int], token: str, own: socket.socket | None = None
    ) -> None:
        family, _, _, _, target = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        self.rank, self.world_size = rank, world_size
        self.peers = range(1, world_size) if rank == 0 else range(1)
        self._token = token.encode()
        self._socket = own or socket.socket(family, socket.SOCK_DGRAM)
        self._addresses: dict[int, Any] = {} if rank == 0 else {0: target}
        self.close = self._socket.close

    @classmethod
    def open(cls) -> "Channel":
        """Open a channel on every rank of the process group: one broadcast of a small object."""
        rank = dist.get_rank()
        own = bound_socket() if rank == 0 else None
        address = (os.environ.get("MASTER_ADDR", socket.gethostname()), own.getsockname()[1] if own else 0)
        shared = [(address, secrets.token_hex(8))]
        dist.broadcast_object_list(shared, src=0)
        return cls(rank, dist.get_world_size(), *shared[0], own)

    def send(self, kind: str, text: str, to: Iterable[int]) -> None:
        """Send to the peers whose address is known. A message that does not get through counts as silence."""
        message = self._token + json.dumps([kind, self.rank, text]).encode()
        for peer in to:
            if peer in self._addresses:
                with contextlib.suppress(OSError):
                    self._socket.sendto(message, self._addresses[peer])

    def receive(self, seconds: float) -> tuple[str, int, str] | None:
        """The next message within that time: kind, sender, text."""
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


def bound_socket(port: int = 0) -> socket.socket:
    """A UDP socket on a port (0: a free one) of all interfaces, IPv6 and IPv4 where there are both."""
    both = socket.has_dualstack_ipv6()
    own = socket.socket(socket.AF_INET6 if both else socket.AF_INET, socket.SOCK_DGRAM)
    if both:
        own.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    # Room for messages of all ranks while this process keeps its threads from running; the system may grant less.
    own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    own.bind(("", port))
    return own
