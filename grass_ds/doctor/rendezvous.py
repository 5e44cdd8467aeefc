# SPDX-License-Identifier: Apache-2.0
"""The ranks talking through torch's key-value store, which works before, and without, a process group.

So the ranks that are missing can be named, and those that are there learn of it, whatever is wrong with the network of the devices.
"""

import contextlib
import json
import os
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore, is_backend_available

from grass_ds.cluster.placement import Placement

SECONDS = 60.0
_LAST_SECONDS = 10.0


class Meeting:
    """Rank 0 hears what the ranks have to say, and tells them what follows from it. All ranks make the same calls in the same order.

    Args:
        place: where this process stands.
        seconds: how long ranks wait for each other.

    Raises:
        RuntimeError: rank 0 does not answer, now or at any later call.
    """

    def __init__(self, place: Placement, seconds: float = SECONDS):
        self._rank, self._world_size, self._seconds = place.rank, place.world_size, seconds
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # then it is torchrun who answers there
        store = TCPStore(
            place.master_addr,
            place.master_port,
            is_master=place.rank == 0 and not agent,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,  # the process group will use the same port
        )
        self._store = PrefixStore("grass_ds_doctor", store)

    def gather(self, topic: str, mine: Any) -> dict[int, Any]:
        """On rank 0 what every rank has to say (without the ranks that are silent for too long), elsewhere nothing."""
        self._store.set(f"{topic}/{self._rank}", json.dumps(mine))
        return self._answers(topic, self._seconds) if self._rank == 0 else {}

    def share(self, topic: str, value: Any) -> Any:
        """Rank 0's ``value``, on all ranks."""
        if self._rank == 0:
            self._store.set(topic, json.dumps(value))
            return value
        # Rank 0 may be late itself, and may have to wait for others.
        self._store.wait([topic], timedelta(seconds=3 * self._seconds))
        return json.loads(self._store.get(topic))

    def leave(self) -> None:
        """The end of it. Rank 0, which keeps the store, goes last."""
        self._store.set(f"left/{self._rank}", "null")
        if self._rank == 0:
            self._answers("left", _LAST_SECONDS)

    def _answers(self, topic: str, seconds: float) -> dict[int, Any]:
        keys = {rank: f"{topic}/{rank}" for rank in range(self._world_size)}
        with contextlib.suppress(RuntimeError):  # some are missing
            self._store.wait(list(keys.values()), timedelta(seconds=seconds))
        return {rank: json.loads(self._store.get(key)) for rank, key in keys.items() if self._store.check([key])}


def backend_available(name: str) -> bool:
    """Whether torch was built with the communication backend ``name``, or a package added it."""
    return is_backend_available(name)
