# SPDX-License-Identifier: Apache-2.0
"""A daemon thread that runs tasks in order and answers with futures.

[Note: Not ThreadPoolExecutor] Its threads are not daemons: they finish all queued tasks before the interpreter ends.
A rank that failed would write gigabytes to files that are about to be removed, while the other ranks wait for its end.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any

JOIN_SECONDS = 60.0
"""How long :meth:`IOThread.shutdown` waits for a disk that does not answer."""


class IOThread:
    """``explain`` is called in the thread with what a task raised, and returns what the task's future raises."""

    def __init__(self, name: str, explain: Callable[[BaseException], BaseException] = lambda error: error):
        self._explain = explain
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, task: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._tasks.put((future, task, arguments))
        return future

    def shutdown(self) -> None:
        """Finish the tasks and end the thread."""
        self._tasks.put(None)
        self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            future, task, arguments = entry
            try:
                future.set_result(task(*arguments))
            except BaseException as error:  # must not end the thread: others wait for their tasks
                future.set_exception(self._explain(error))
            del entry, future, task, arguments  # which hold tensors
