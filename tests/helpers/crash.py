# SPDX-License-Identifier: Apache-2.0
"""A run that may be killed at any time: it resumes from the newest checkpoint, trains, saves, and reports each event.

A :class:`Attempt` is one start of it, with a process per rank. Ranks are forked from a process that has imported
:mod:`helpers.preloaded` and has no second thread, so that an attempt costs a fraction of a second.
"""

import copy
import hashlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helpers.models import engine_of, tiny_llama, train
from helpers.observed import observe
from helpers.ranks import free_port, rank_environment

WORLD = 2
HUNG = 60.0  # seconds without an event of any rank


@dataclass(frozen=True)
class Run:
    """A run of ``steps`` optimizer steps that saves after every ``every`` of them, never if ``folder`` is None."""

    config: dict[str, Any]
    steps: int
    every: int
    folder: Path | None = None

    @property
    def background(self) -> bool:
        return bool(self.config.get("checkpoint", {}).get("async"))

    def published(self) -> int:
        """The step to resume from: that of ``latest``; killed before there is one, that of the first checkpoint; or 0."""
        if self.folder is None:
            return 0
        latest = self.folder / "latest"
        tags = [latest.read_text()] if latest.exists() else [path.name for path in self.folder.glob("step*")]
        return max((int(tag.removeprefix("step")) for tag in tags), default=0)

    def leftovers(self) -> list[str]:
        """What is in the folder and is no checkpoint."""
        return sorted(path.name for path in self.folder.glob(".*")) if self.folder is not None else []


# ---- a rank ---------------------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """An event of a rank: ``loading``, ``step``, ``saving``, ``saved``, or ``state``, a digest of the whole run."""

    what: str
    step: int
    value: Any = None
    time: float = 0.0


def digest_of(value: Any) -> str:
    """Of nested dicts with tensors: differs when :func:`helpers.observed.difference` would find something."""
    total = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        if isinstance(item, dict):
            for key in sorted(item, key=str):
                total.update(f"{key}:".encode())
                add(item[key])
        elif isinstance(item, torch.Tensor):
            total.update(f"{item.dtype}{tuple(item.shape)}".encode())
            total.update(item.contiguous().reshape(-1).view(torch.uint8).numpy())
        else:
            total.update(repr(item).encode())

    add(value)
    return total.hexdigest()


def _rank(rank: int, run: Run, port: int, events: Any, log: Path) -> None:
    """One rank of an attempt, from start to end."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(rank_environment(rank, WORLD, port))
    try:
        _train(run, lambda *event: events.send(Event(*event, *[None] * (3 - len(event)), time.monotonic())))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def _train(run: Run, send: Callable[..., None]) -> None:
    from deepspeed import init_distributed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    init_distributed("gloo", verbose=False)
    config, seed = copy.deepcopy(run.config), 0
    if run.published():  # nothing of what this attempt begins with may be seen later
        config["grass"]["seed"] += 1
        seed = 9
    with engine_of(config, tiny_llama(seed=seed)) as engine:
        if run.folder is not None:
            send("loading", 0)
            engine.load_checkpoint(run.folder)
        send("state", engine.global_steps, digest_of(observe(engine)))

        while (step := engine.global_steps) < run.steps:
            [loss] = train(engine, 1, start=step)
            send("step", step + 1, loss)
            if (step + 1) % run.every:
                continue
            if run.folder is None:
                send("state", step + 1, digest_of(observe(engine)))
            else:
                send("saving", step + 1)
                engine.save_checkpoint(run.folder, tag=f"step{step + 1}")
                send("saved", step + 1)
        if run.background:
            engine.wait_for_checkpoint()
        send("state", run.steps, digest_of(observe(engine)))


# ---- an attempt ---------------------------------------------------------------------------------------------------------


class Hung(Exception):
    """No rank sent an event for a long time."""


class Attempt:
    """One start of ``run``, with the events of its ranks; what they print goes to ``<log>.rank<n>``."""

    def __init__(self, run: Run, log: Path):
        context, port = multiprocessing.get_context("fork"), free_port()
        self.run = run
        self.seen: list[list[Event]] = [[] for _ in range(WORLD)]
        self._logs = [log.with_name(f"{log.name}.rank{rank}") for rank in range(WORLD)]
        self._pipes, self._ranks = [], []
        for rank in range(WORLD):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, run, port, there, self._logs[rank]))
            process.start()
            there.close()  # or the pipe would outlive the rank
            self._pipes.append(here)
            self._ranks.append(process)

    def events(self) -> Iterator[tuple[int, Event]]:
        """As they come, until all ranks are gone."""
        while open_pipes := [pipe for pipe in self._pipes if not pipe.closed]:
            if not (ready := connection.wait(open_pipes, timeout=HUNG)):
                raise Hung
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    event = pipe.recv()
                except EOFError:
                    pipe.close()
                    continue
                self.seen[rank].append(event)
                yield rank, event

    def wait(self) -> None:
        """Wait for all ranks to end."""
        for _ in self.events():
            pass

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            self._ranks[rank].kill()

    def stop(self) -> None:
        """Kill who is left, and read the events that all had sent."""
        self.kill(list(range(WORLD)))
        for process in self._ranks:
            process.join()
        self.wait()

    @property
    def alive(self) -> list[int]:
        return [rank for rank, process in enumerate(self._ranks) if process.is_alive()]

    @property
    def failures(self) -> list[str]:
        """Ranks that ended by themselves and not well, with what they wrote last."""
        codes = {rank: process.exitcode for rank, process in enumerate(self._ranks)}
        return [
            f"rank {rank} ended with exit code {code}:\n{self._logs[rank].read_text()[-1000:]}"
            for rank, code in codes.items()
            if code not in (0, -signal.SIGKILL)
        ]

    def resumed_at(self, rank: int) -> int | None:
        """The step that the rank has resumed at."""
        return next((event.step for event in self.seen[rank] if event.what == "state"), None)
