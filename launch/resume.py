"""Where a run of launch/train.py continues: --resume_from_checkpoint, decided once for all ranks."""

from __future__ import annotations

from pathlib import Path

from grass_ds.core.durable_files import listed
from grass_ds.trainer.checkpoints import newest_complete, problems
from launch import distributed


def resume_point(wanted: str | None, output_dir: Path) -> str | None:
    """The checkpoint folder to continue from, the same on every rank; None to start from the beginning.

    Args:
        wanted: a folder; "true" for the newest complete checkpoint in `output_dir`, if there is one; None or "false".

    Raises:
        AgreedError: on every rank: the folder cannot be continued from, with what is wrong and which can.
    """
    # The others take rank 0's answer: while the first ranks start to train, the folder may change.
    answer = distributed.on_every_rank(lambda: _choose(wanted, output_dir) if distributed.rank() == 0 else None)
    return distributed.gather(lambda: answer)[0]


def wants_to_resume(wanted: str | None) -> bool:
    """Whether `--resume_from_checkpoint` asks to continue, if there is a checkpoint."""
    return wanted is not None and wanted.lower() not in ("", "false", "none")


def _choose(wanted: str | None, output_dir: Path) -> str | None:
    if wanted is None or not wants_to_resume(wanted):
        return None
    if wanted.lower() != "true":
        _check(Path(wanted))
        return wanted
    found, warnings = newest_complete(output_dir)
    for sentence in warnings:
        print(f"warning: {sentence}", flush=True)
    if found is None:
        print(f"no complete checkpoint in {output_dir}: starting from the beginning", flush=True)
        return None
    print(f"continuing from {found}", flush=True)
    return str(found)


def _check(checkpoint: Path) -> None:
    found = problems(checkpoint)
    if not found:
        return
    complete, _ = newest_complete(checkpoint.parent)
    remedy = (
        "there is no complete checkpoint beside it" if complete is None else f"the newest complete one is {complete}"
    )
    raise ValueError(f"--resume_from_checkpoint {checkpoint}: not complete: {listed(found)}; {remedy}")
