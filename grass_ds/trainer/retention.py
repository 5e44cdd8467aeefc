# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of the HF Trainer are kept: an old one goes only when a newer one is complete.

[Note: Rotation] The Trainer removes old checkpoints while the newest is not yet complete: files of other ranks may be
missing, and with asynchronous saving the engine's part. With ``save_total_limit=1`` a job killed then has nothing
left. With 2 or more the one before the newest stays. That one is complete: a save begins by waiting for the one
before. But the Trainer also counts what killed jobs left behind. After ``grass_ds.attach`` :func:`remove_surplus`
keeps the limit. Without it, :func:`prepare_for_trainer` makes the Trainer's own rotation safe.
"""

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from grass_ds.trainer import checkpoints


def prepare_for_trainer(args: Any, step: int) -> None:
    """Before training, remove the incomplete checkpoints that the Trainer would count. ValueError for a limit of 1."""
    if args.save_total_limit == 1:
        raise ValueError(
            "TrainingArguments.save_total_limit = 1: the Trainer would remove the only complete checkpoint before the next "
            "one is complete; call grass_ds.attach(trainer) after building the Trainer, which keeps the limit, or set it to "
            "2 or more"
        )
    remove_surplus(args, sys.maxsize, step, best=None)


def remove_surplus(args: Any, limit: int | None, step: int, best: str | None, at_end: bool = False) -> None:
    """Remove the checkpoints of :func:`surplus`, on the process that saves. One that cannot be removed stays."""
    if not args.should_save:
        return
    for checkpoint in surplus(Path(args.output_dir), limit, step, best, at_end):
        with suppress(OSError):  # raised here alone it would leave the other ranks waiting
            # First it must no longer look complete: the job may be killed in the middle.
            (checkpoint / checkpoints.TRAINER_STATE).unlink(missing_ok=True)
            shutil.rmtree(checkpoint)


def surplus(folder: Path, limit: int | None, step: int, best: str | None, at_end: bool = False) -> list[Path]:
    """The checkpoints to remove, oldest first, so that ``limit`` complete ones stay (None or 0: all).

    The newest complete one always stays, and so do newer ones (not complete yet) and the ``best``. Checkpoints of
    later steps than ``step`` are of an earlier run that was given up, and count as the oldest. ``at_end``, a limit of
    1 leaves the best alone, as with the Trainer.
    """
    ordered = sorted(checkpoints.checkpoints(folder), key=lambda path: checkpoints.step_of(path) <= step)
    complete = [path for path in ordered if limit and not checkpoints.problems(path, contents=False)]
    if not limit or not complete:
        return []
    kept = {path for path in complete if best is not None and path.name == Path(best).name}
    if not (at_end and limit == 1 and kept):
        kept.add(complete[-1])
    others = [path for path in reversed(complete) if path not in kept]
    kept.update(others[: max(limit - len(kept), 0)])
    return [path for path in ordered[: ordered.index(complete[-1]) + 1] if path not in kept]
