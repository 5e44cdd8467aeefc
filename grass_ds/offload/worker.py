# SPDX-License-Identifier: Apache-2.0
"""A thread that does jobs in order."""

import queue
import threading
from collections.abc import Callable
from typing import Any

Job = Callable[[], None]
JOIN_SECONDS = 60.0


class Worker:
    """One daemon thread; jobs run in the order they were submitted.

    Args:
        name: of the thread.
        enter: called first in the thread.
        failed: called in the thread with what a job raised; the thread goes on with the next job.
    """

    def __init__(self, name: str, enter: Callable[[], None], failed: Callable[[BaseException], object]):
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        self._enter, self._failed = enter, failed
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def wait_idle(self) -> None:
        """Block until every job submitted so far is done."""
        done = threading.Event()
        self._jobs.put(done.set)
        done.wait()

    def close(self) -> None:
        """Finish the jobs and end the thread."""
        self._jobs.put(None)
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        self._guard(self._enter)
        while (job := self._jobs.get()) is not None:
            self._guard(job)

    def _guard(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:  # a job that dies must not take the thread with it: others wait for theirs
            self._failed(error)
