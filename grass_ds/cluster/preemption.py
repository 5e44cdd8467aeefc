# SPDX-License-Identifier: Apache-2.0
"""Stopping without loss when the scheduler asks for it.

[Note: Preemption] A scheduler that wants a machine back sends a signal and kills some time later. The signal may reach
one rank or all, once or several times, and at different steps of different ranks. If one rank acted on it alone, the
others would wait for it. So the handler only remembers it. At the end of each step the ranks compare what they
received, in one all-reduce of one number. All act in the same step: save, and exit with :data:`PREEMPTED`, which tells
a job script to queue the run again.
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
"""Exit code of a run that saved a checkpoint because it was asked to stop (EX_TEMPFAIL of sysexits.h: try again)."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Preemption:
    """Remembers the scheduler's signals from its construction on; make one per process, in the main thread.

        preemption = grass_ds.Preemption()
        for batch in batches:
            ...
            engine.step()
            if preemption.agreed():
                engine.save_checkpoint(folder)
                engine.wait_for_checkpoint()
                break
        sys.exit(preemption.end())

    By default the signals are SIGUSR1, which SLURM sends before the time limit (``sbatch --signal``), and SIGTERM,
    which ``scancel``, ``scontrol requeue``, preemption and most other schedulers send.
    """

    def __init__(self, signals: Sequence[signal.Signals] = SIGNALS) -> None:
        self.received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {each: signal.signal(each, self._on_signal) for each in signals}

    def agreed(self) -> bool:
        """Whether any rank was asked to stop by now: the same answer on every rank.

        Call it on all ranks, after a step. One all-reduce of one int64; none once the answer is yes, or with one rank.
        """
        if self._agreed is None:
            self._agreed = self._received_by_any_rank()
            if self._agreed is not None and self.received is None:
                _announce(self._agreed)
        return self._agreed is not None

    @property
    def reason(self) -> str:
        """The name of the signal that all ranks act on; empty while there is none."""
        return "" if self._agreed is None else self._agreed.name

    def end(self) -> int:
        """Return the exit code, :data:`PREEMPTED` or 0, and ignore all signals: the last call of a program.

        The first rank that ends makes launchers send SIGTERM to the others, whose handlers Python may have removed.
        """
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)
        return PREEMPTED if self.reason else 0

    def close(self) -> None:
        """Restore the previous signal handlers."""
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _received_by_any_rank(self) -> signal.Signals | None:
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_distributed()  # takes over a process group that is not DeepSpeed's
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.received
        device = get_accelerator().current_device_name()
        largest = torch.tensor([self.received or 0], dtype=torch.int64, device=device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return signal.Signals(int(largest.item())) if largest.item() else None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked process, which inherited the handler
            if number == signal.SIGTERM:  # its parent ends it in this way, and waits
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        elif self.received is None:
            self.received = signal.Signals(number)
            _announce(self.received)


def _announce(received: signal.Signals) -> None:
    """On rank 0. Not by a logger: a signal interrupts the program anywhere, perhaps inside the logger."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"grass_ds: {received.name} received: saving and stopping at the end of this step\n".encode())


def ignore_signals(worker: int, init: Callable[[int], None] | None = None) -> None:
    """A ``worker_init_fn`` of a `torch.utils.data.DataLoader`, whose workers would die of the scheduler's signals.

    ``init`` is another one, to be called as well.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if init is not None:
        init(worker)
