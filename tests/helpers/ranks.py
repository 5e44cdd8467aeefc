# SPDX-License-Identifier: Apache-2.0
"""Ranks as real processes: a pool per world size, started once, that runs functions of test modules on every rank.

``pool.run(function, **arguments)`` calls ``function(**arguments)`` on each rank and returns the results in rank order.
A rank that fails fails the test with its traceback; one that hangs fails it after the time-out. Either way the pool is
killed and the next test gets a new one, so no test inherits a broken process group.

On ``cpu``, ranks are forked from a server that has imported once what each of them would take seconds of processor
time to import (it finds :mod:`helpers.preloaded` by PYTHONPATH; without, all works, later).
"""

import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

START_TIMEOUT = 180.0
GRACE = 15.0
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["helpers.preloaded"])


class RankFailure(AssertionError):
    """A rank raised, died or hung."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world: int, port: int, accelerator: str = "cpu") -> dict[str, str]:
    return {
        "DS_ACCELERATOR": accelerator,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _serve(pipe: Connection, rank: int, world: int, port: int, accelerator: str) -> None:
    os.environ.update(rank_environment(rank, world, port, accelerator))
    import torch
    from deepspeed import init_distributed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    torch.set_num_threads(1)
    logger.setLevel("WARNING")
    warnings.simplefilter("ignore", FutureWarning)  # or torch says one for every collective
    init_distributed(get_accelerator().communication_backend_name(), verbose=False)
    pipe.send(("ready", None))
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send(("ok", function(**arguments)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))


class RankPool:
    """``world`` processes in one process group: gloo on ``cpu``, NCCL on ``cuda``."""

    def __init__(self, world: int, accelerator: str = "cpu"):
        self.world = world
        self._accelerator = accelerator
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *, timeout: float = 120.0, **arguments: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        return self._collect(timeout, function.__name__)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        # CUDA cannot be used in a forked process.
        context = FORKED if self._accelerator == "cpu" else multiprocessing.get_context("spawn")
        port = free_port()
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, self.world, port, self._accelerator), daemon=True
            )
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        self._collect(START_TIMEOUT, "start-up")

    def _collect(self, timeout: float, what: str) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(errors) < self.world and time.monotonic() < deadline:
            for rank, pipe in enumerate(self._pipes):
                if rank in results or rank in errors or not pipe.poll(0.02):
                    continue
                try:
                    kind, value = pipe.recv()
                except EOFError:
                    self._processes[rank].join(GRACE)
                    kind, value = "error", f"rank {rank} died with exit code {self._processes[rank].exitcode}"
                (errors if kind == "error" else results)[rank] = value
                if kind == "error":  # the others may now wait for it for ever
                    deadline = min(deadline, time.monotonic() + GRACE)
        if len(results) == self.world:
            return [results[rank] for rank in range(self.world)]
        silent = sorted(set(range(self.world)) - results.keys() - errors.keys())
        self.close()
        report = "\n".join(f"--- rank {rank}:\n{text}" for rank, text in sorted(errors.items()))
        raise RankFailure(f"{what} failed; no answer from ranks {silent} within {timeout:.0f} s\n{report}")
