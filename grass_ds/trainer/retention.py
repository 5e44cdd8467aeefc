# SPDX-License-Identifier: Apache-2.0
"""Keeping the HF Trainer's checkpoints: each is sealed, and old ones go only when newer ones are complete."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from grass_ds.core.agreement import gather_from_ranks
from grass_ds.core.durable_files import sync_folder
from grass_ds.trainer import checkpoints
from grass_ds.trainer.checkpoints import Sums


class CheckpointKeeper:
    """Seals checkpoints, and stands in for the Trainer's ``save_total_limit``. For one ``train()``; on every rank.

    The Trainer removes old checkpoints while the newest one is not yet complete: other ranks' files may be missing, and with
    asynchronous saving the engine's part. A job killed then would have nothing left. So ``args.save_total_limit`` is None from
    construction to :meth:`close` (also in the ``training_args.bin`` of checkpoints) and the limit is kept here.

    Args:
        args: the Trainer's ``TrainingArguments``.
    """

    def __init__(self, args: Any):
        self._args = args
        self._folder = Path(str(args.output_dir))
        self._limit: int | None = args.save_total_limit
        args.save_total_limit = None

    def close(self) -> None:
        """Give the Trainer its limit back."""
        self._args.save_total_limit = self._limit

    def seal(self, step: int) -> None:
        """Put ``checkpoint-<step>``, as far as the Trainer wrote it, on disk and say so in it. Collective.

        Raises:
            OSError: a file could not be put on disk; RankFailedError on the other ranks.
        """
        checkpoint = self._folder / f"checkpoint-{step}"
        rank, ranks = self._args.process_index, self._args.world_size
        own = [checkpoint / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth")]
        if self._args.should_save:
            others = {f"rng_state_{other}.pth" for other in range(ranks)}
            own += [
                path for path in checkpoints.trainer_files(checkpoint) if path not in own and path.name not in others
            ]
        sums = self._together(lambda: _settle(own))
        self._together(lambda: self._write_seal(checkpoint, sums))

    def tidy(self, step: int, best: str | None, at_end: bool = False) -> None:
        """Remove what is beyond the limit, see :func:`surplus`. What cannot be removed stays."""
        if not self._args.should_save:
            return
        for checkpoint in surplus(self._folder, self._limit, step, best, at_end):
            with suppress(OSError):  # raised here alone it would leave the other ranks waiting
                # First of all it must no longer look complete, should the job be killed in the middle.
                (checkpoint / checkpoints.TRAINER_STATE).unlink(missing_ok=True)
                shutil.rmtree(checkpoint)

    def _write_seal(self, checkpoint: Path, sums: Sums) -> Sums:
        if self._args.should_save:
            checkpoints.write_seal(checkpoint, sums)
            sync_folder(self._folder)
        return sums

    def _together(self, task: Callable[[], Sums]) -> Sums:
        """What all ranks' ``task`` return, in one.

        Raises:
            OSError: on the rank where it failed; RankFailedError on the others.
        """
        parts = gather_from_ranks(task) if self._args.world_size > 1 else [task()]
        return {name: sums for part in parts for name, sums in part.items()}


def surplus(folder: Path, limit: int | None, step: int, best: str | None, at_end: bool = False) -> list[Path]:
    """The checkpoints to remove, oldest first, so that ``limit`` complete ones stay.

    Always kept: the newest complete one, whatever is newer (a checkpoint under way), and the ``best``. Those of later steps than
    ``step`` are of a run that was given up, and count as the oldest.

    Args:
        limit: ``save_total_limit``; None or 0 for all.
        step: the steps trained so far.
        best: ``state.best_model_checkpoint``.
        at_end: training is over: with a limit of 1 the Trainer keeps the best alone.
    """
    if not limit or limit < 0:
        return []
    ordered = sorted(
        checkpoints.checkpoints(folder),
        key=lambda path: (checkpoints.step_of(path) <= step, checkpoints.step_of(path)),
    )
    complete = [path for path in ordered if not checkpoints.problems(path, contents=False)]
    if not complete:
        return []
    kept_best = [path for path in complete if best is not None and path.name == Path(best).name]
    if at_end and limit == 1 and kept_best:
        kept = kept_best
    else:
        kept = list(dict.fromkeys([complete[-1], *kept_best, *reversed(complete)]))
        kept = kept[: max(limit, len({complete[-1], *kept_best}))]
    return [path for path in ordered[: ordered.index(complete[-1]) + 1] if path not in kept]


def _settle(paths: list[Path]) -> Sums:
    """Put files on disk; what they are."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return {path.name: checkpoints.sum_of(path) for path in paths}
