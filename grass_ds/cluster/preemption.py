# SPDX-License-Identifier: Apache-2.0
"""Stopping without loss when the scheduler asks for it.

[Note: Preemption] A scheduler that wants a machine back sends a signal and kills some time later. It may reach one rank or all, once or
several times, and at different steps of different ranks: a rank that acted on it alone would leave the others waiting. So the handler only
takes note. At the end of each step the ranks compare notes, in one all-reduce of one number, and all of them act in the same step: save, and
exit with :data:`PREEMPTED`, by which a job script knows that the run is to be queued again.

Schedulers send their signals to helper processes as well, whose death would end the step at once: see :func:`shielded`.
"""

import os
import signal
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

PREEMPTED = 75
"""Exit code of a run that has saved a checkpoint because it was asked to stop (EX_TEMPFAIL of sysexits.h: try again)."""


class Preemption:
    """Takes note of the scheduler's signals from its construction on; make one per process, in the main thread.

        preemption = grass_ds.Preemption()
        for batch in batches:
            ...
            engine.step()
            if preemption.agreed():
                engine.save_checkpoint(folder)
                engine.wait_for_checkpoint()
                break
        sys.exit(preemption.end())

    Args:
        signals: by default SIGUSR1, which SLURM sends before the time limit (``sbatch --signal``), and SIGTERM, which ``scancel``, ``scontrol
            requeue``, preemption and most other schedulers send.
    """

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGUSR1, signal.SIGTERM)) -> None:
        self.received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}
        for number in signals:
            self._previous[number] = signal.signal(number, self._note)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop by now: the same answer on every rank. Call it on all ranks, after a step.

        One all-reduce of one int64; none once the answer is yes, or with one rank.
        """
        if self._agreed is None:
            self._agreed = self._largest()
            if self._agreed is not None and self.received is None:
                self._say(self._agreed)  # another rank's signal
        return self._agreed is not None

    @property
    def reason(self) -> str:
        """The signal that all ranks act on, by name; empty while there is none."""
        return "" if self._agreed is None else self._agreed.name

    def end(self) -> int:
        """The last thing a program does: returns its exit code, :data:`PREEMPTED` or 0, and lets no signal change it any more.

        The first rank that ends makes launchers send SIGTERM to the others, and Python gives handlers up long before a process is gone.
        """
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        return PREEMPTED if self.reason else 0

    def close(self) -> None:
        """Give the signals back to those who handled them before."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _largest(self) -> signal.Signals | None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_distributed()  # takes over a process group that is not DeepSpeed's
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.received
        device = get_accelerator().current_device_name()
        note = torch.tensor([self.received or 0], dtype=torch.int64, device=device)
        dist.all_reduce(note, op=dist.ReduceOp.MAX)
        return signal.Signals(int(note.item())) if note.item() else None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _as_child(number)
        elif self.received is None:
            self.received = signal.Signals(number)
            self._say(self.received)

    @staticmethod
    def _say(received: signal.Signals) -> None:
        """On rank 0, for all. Not by a logger: a signal interrupts the program anywhere, perhaps inside the logger."""
        if os.environ.get("RANK", "0") == "0":
            text = f"grass_ds: {received.name} received: saving and stopping at the end of this step\n"
            os.write(2, text.encode())


def _as_child(number: int) -> None:
    """A forked process has inherited the handler. Its parent ends it by SIGTERM, and waits for that; the rest is not meant for it."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


class shielded:
    """A ``worker_init_fn`` of a `torch.utils.data.DataLoader` for training, whose workers survive the signals: the step they load for is still to be done.

    torch lets workers die of a SIGTERM that is not their parent's, and the parent of that. They end with their parent anyway.

    Args:
        init: the ``worker_init_fn`` to call besides, if any.
    """

    def __init__(self, init: Callable[[int], None] | None = None) -> None:
        self._init = init

    def __call__(self, worker: int) -> None:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if self._init is not None:
            self._init(worker)
