# SPDX-License-Identifier: Apache-2.0
"""Silent ranks are found and named in time. No rank is accused that left, or while the job was suspended."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from deepspeed import comm as dist

from grass_ds.cluster.channel import Channel, bound_socket
from grass_ds.cluster.heartbeat import LEAVE_SECONDS, RANK_LOST, Heartbeat, Silence

LIMIT, INTERVAL, WORLD = 1.5, 0.25, 3
SLACK = 10.0  # processors may be busy with other tests; nobody waits for it who is in time


# ---- the decision ---------------------------------------------------------------------------------------------------


def test_silence_is_counted_in_rounds_from_the_last_sign() -> None:
    silence = Silence(peers=[1, 2, 3, 4], limit=3)
    for rank in (1, 2, 3):
        silence.heard(rank)
    assert silence.end_round() == []
    silence.heard(2)
    silence.left(3)
    silence.heard(3)  # arrives after the message that it leaves
    assert [silence.end_round(), silence.end_round()] == [[], []]
    silence.heard(2)
    assert silence.end_round() == [1]  # not 3, which left, nor 4, which never came
    assert silence.never_heard() == [4]


def test_ranks_that_died_together_are_named_together() -> None:
    silence = Silence(peers=[1, 2, 3], limit=3)
    silence.heard(2)
    silence.end_round()
    silence.heard(1)  # its last beat came just after the end of the round
    for _ in range(2):
        silence.heard(3)
        assert silence.end_round() == []
    silence.heard(3)
    assert silence.end_round() == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"interval": 0.0}, "interval=0.0: must be above 0"),
        ({"limit": 14.0}, "limit=14.0: must be at least .* 15 sec"),
    ],
)
def test_times_out_of_range(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Heartbeat(**arguments)


# ---- processes ------------------------------------------------------------------------------------------------------


def _rank(channel: Channel, stderr: Path) -> None:
    """A rank whose main thread hangs, until it is told to finish by a signal."""
    os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    heartbeat = Heartbeat(LIMIT, INTERVAL)
    heartbeat.start(channel)
    signal.sigwait([signal.SIGUSR1])
    heartbeat.stop()


class Ranks:
    """Forked, so that they cost no import; they communicate over their channels only."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        own = bound_socket()
        address = ("localhost", own.getsockname()[1])
        context = multiprocessing.get_context("fork")
        self.stderr = [folder / f"{rank}.err" for rank in range(WORLD)]
        self.processes: list[Any] = []
        for rank in range(WORLD):
            channel = Channel(rank, WORLD, address, "token", own if rank == 0 else None)
            self.processes.append(context.Process(target=_rank, args=(channel, self.stderr[rank]), daemon=True))
            self.processes[-1].start()
        own.close()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)

    def exit_codes(self, timeout: float, *ranks: int) -> list[int | None]:
        end = time.monotonic() + timeout
        for rank in ranks:
            self.processes[rank].join(max(end - time.monotonic(), 0.0))
        return [self.processes[rank].exitcode for rank in ranks]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    started: list[Ranks] = []

    def start() -> Ranks:
        started.append(Ranks(tmp_path / str(len(started))))
        return started[-1]

    yield start
    for group in started:
        group.close()


@pytest.mark.dist
def test_survivors_stop_in_time_and_name_the_lost_rank(ranks: Any) -> None:
    """A stopped process is like a host without power: its connections stay, and nothing comes from it."""
    cases = [(0, signal.SIGSTOP), (2, signal.SIGSTOP), (1, signal.SIGKILL)]
    groups = [ranks() for _ in cases]
    time.sleep(4 * INTERVAL)
    for group, (lost, number) in zip(groups, cases, strict=True):
        group.signal(number, lost)
    stopped = time.monotonic()
    for group, (lost, _) in zip(groups, cases, strict=True):
        survivors = sorted(set(range(WORLD)) - {lost})
        left = stopped + LIMIT + 2 * INTERVAL + SLACK - time.monotonic()
        assert group.exit_codes(left, *survivors) == [RANK_LOST, RANK_LOST]
        for rank in survivors:
            (line,) = group.stderr[rank].read_text().splitlines()
            host = socket.gethostname()
            assert f"lost: rank {lost} on host {host}; silent for 1.5 s" in line
            assert f"Rank {rank} on host {host} stops with exit code 76; the job can be resumed" in line
    assert time.monotonic() - stopped > LIMIT - INTERVAL


@pytest.mark.dist
def test_no_rank_is_accused_that_was_suspended_with_all_or_left(ranks: Any) -> None:
    group, nothing_happens = ranks(), LIMIT + 2 * INTERVAL
    time.sleep(2 * INTERVAL)
    group.signal(signal.SIGSTOP, 0, 1, 2)
    time.sleep(nothing_happens)
    group.signal(signal.SIGCONT, 1, 0, 2)
    for leaves in (1, 0, 2):  # also rank 0 before another
        group.signal(signal.SIGUSR1, leaves)
        assert group.exit_codes(LEAVE_SECONDS, leaves) == [0]  # confirmed at once
        if leaves != 2:
            time.sleep(nothing_happens)
    assert [file.read_text() for file in group.stderr] == ["", "", ""]


def meet_and_leave(first: int) -> float:
    """Seconds that leaving took at most, in two uses of one heartbeat."""
    heartbeat, seconds = Heartbeat(LIMIT, INTERVAL), 0.0
    for _ in range(2):
        with heartbeat:
            running = "grass_ds heartbeat" in [thread.name for thread in threading.enumerate()]
            assert running == (dist.get_world_size() > 1)
            if dist.get_rank() != first:
                time.sleep(2 * INTERVAL)
            left = time.monotonic()
        seconds = max(seconds, time.monotonic() - left)
    return seconds


@pytest.mark.dist
def test_ranks_of_a_process_group_meet_more_than_once(two_ranks: Any) -> None:
    assert max(two_ranks.run(meet_and_leave, first=0)) < LEAVE_SECONDS


@pytest.mark.dist
def test_one_rank_needs_no_heartbeat(one_rank: Any) -> None:
    one_rank.run(meet_and_leave, first=0)


def seconds_to_cause(leaving: int) -> float:
    """Seconds until a rank whose collective failed knows that no rank is lost, since the one that failed has left."""
    heartbeat = Heartbeat(limit=6.0, interval=0.5)
    with heartbeat:
        if dist.get_rank() == leaving:
            time.sleep(1.0)  # all have been heard
            return 0.0
        start = time.monotonic()
        heartbeat.wait_for_cause()
        return time.monotonic() - start


@pytest.mark.dist
@pytest.mark.parametrize("leaving", [0, 1])
def test_an_error_of_a_rank_that_is_not_lost_is_soon_known(two_ranks: Any, leaving: int) -> None:
    assert 0.5 < max(two_ranks.run(seconds_to_cause, leaving=leaving)) < 4.0
