"""The first import of a program in launch/: Ctrl-C ends it at once, and a package that it needs is missed by name."""

from __future__ import annotations

import os
import signal
import threading
from importlib.util import find_spec
from types import FrameType

REMEDY = "pip install '.[launch]' in the folder of grass_ds"
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells say it."""
# Variables with the rank before there is a process group: torchrun and DeepSpeed, SLURM, Open MPI, other MPIs.
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def end_on_interrupt() -> None:
    """From now on SIGINT ends this process, with one message from rank 0.

    No exception, no clean-up: the main thread may be waiting for other ranks, which end, too. Python runs a handler
    when the main thread next returns from C++, which in a collective it may never do. So a thread is told as well.
    """
    signal.signal(signal.SIGINT, _end)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading, os.getpid()), daemon=True).start()


_process = os.getpid()
_ending = threading.Lock()


def _end(number: int, frame: FrameType | None) -> None:
    # A forked worker has inherited the handler; its parent speaks. The first of handler and thread ends the process.
    if os.getpid() == _process and _ending.acquire(timeout=1.0):
        rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
        if rank == "0":
            os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def _watch(reading: int, process: int) -> None:
    while signals := os.read(reading, 64):
        if signal.SIGINT in signals and os.getpid() == process:
            _end(signal.SIGINT, None)


def check_packages() -> None:
    """Raise ImportError if datasets is not installed, or transformers lacks what `launch.hf_trainer` overrides."""
    if find_spec("datasets") is None:
        raise ImportError(f"the programs in launch/ need datasets, which is not installed: {REMEDY}")
    import deepspeed  # noqa: F401  # before transformers: some of their releases import each other in a circle
    import transformers

    if not hasattr(transformers.Trainer, "_run_epoch"):
        raise ImportError(
            "the programs in launch/ need transformers.Trainer._run_epoch, which transformers "
            f"{transformers.__version__} does not have: {REMEDY}"
        )


end_on_interrupt()  # before what takes seconds to import
check_packages()
