# SPDX-License-Identifier: Apache-2.0
"""The I/O thread: tasks in order, errors in their futures, and no task that outlives the interpreter."""

import pytest
from helpers.disks import run_python

from grass_ds.offload.io_thread import IOThread


def test_tasks_run_in_order_and_a_failed_one_does_not_end_the_thread() -> None:
    thread, done = IOThread("test"), list[int]()
    futures = [thread.submit(lambda number: done.append(1 // number), number) for number in (1, 0, 2)]
    thread.shutdown()
    assert done == [1, 0]
    assert futures[0].result() is None and futures[2].result() is None
    with pytest.raises(ZeroDivisionError):
        futures[1].result()


def test_queued_tasks_do_not_hold_up_the_end_of_the_process() -> None:
    source = """
import time
from grass_ds.offload.io_thread import IOThread
thread = IOThread("test")
for _ in range(600):
    thread.submit(time.sleep, 1)
print("end")
"""
    assert "end" in run_python(source, timeout=120.0)
