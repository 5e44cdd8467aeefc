"""torchrun for job scripts: it hands SIGUSR1 and SIGTERM to its ranks, and ends with the code of the first that fails.

    srun --ntasks-per-node=1 python launch/torchrun.py --nnodes=2 --nproc-per-node=8 ... launch/train.py ...

Most clusters send signals to the processes that srun started and to no others. torchrun itself dies of SIGUSR1, gives
its ranks 30 seconds after SIGTERM however long they have, and turns every exit code into 1: a job script could not
tell a saved run from a failed one.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from types import FrameType

signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the imports take seconds; torchrun handles it from then on

import psutil  # noqa: E402
from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: E402
from torch.distributed.run import get_args_parser, main  # noqa: E402

HANDED_ON = (signal.SIGUSR1, signal.SIGTERM)


def hand_on(number: int, frame: FrameType | None) -> None:
    """Send it to the ranks, which decide what to do."""
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def run() -> int:
    """torchrun's command line; the exit status."""
    # It reports each rank that it ends. The rank that failed has said why, or ends by a signal, which is said below.
    for part in ("multiprocessing", "agent.server"):
        logging.getLogger(f"torch.distributed.elastic.{part}.api").setLevel(logging.CRITICAL)
    for number in HANDED_ON:
        signal.signal(number, hand_on)
    # Before torch 2.9 it takes SIGTERM for itself, and the ranks have 30 seconds after it.
    choice = "--signals-to-handle"
    known = choice in get_args_parser().format_help()
    try:
        main([*([f"{choice}=SIGINT,SIGHUP,SIGQUIT"] if known else []), *sys.argv[1:]])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr, flush=True)
        return 128 - failure.exitcode  # as shells say it
    except SignalException as error:
        return 128 + error.sigval
    finally:
        # srun ends the other machines' agents as soon as one has ended; that must not replace the code.
        for number in HANDED_ON:
            signal.signal(number, signal.SIG_IGN)
    return 0


if __name__ == "__main__":
    sys.exit(run())
