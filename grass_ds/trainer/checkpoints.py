# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the HF Trainer on disk: how they are sealed, and from which of them a run can resume.

[Note: Trainer checkpoints] ``checkpoint-<step>/`` has two parts. The engine's part is a folder that ``latest`` names.
It becomes visible as a whole, with asynchronous saving some time later. The other files are the Trainer's, each
written in place, so a killed job leaves some of them missing or cut off. ``GrassCallback`` therefore adds a last file,
the seal ``grass_trainer.json``, with the lengths and checksums of the others. A checkpoint is complete when both parts
are. Without a seal (no callback, or killed just before it) the form of the files is checked.
"""

import json
import logging
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deepspeed.utils import log_dist

from grass_ds.checkpoint import folder as engine_parts
from grass_ds.checkpoint.part import FileSum, crc32_of
from grass_ds.core.agreement import gather_from_ranks
from grass_ds.core.durable_files import listed, replace_file, sync_file, sync_folder

SEAL = "grass_trainer.json"
TRAINER_STATE = "trainer_state.json"
# Larger files of the Trainer hold weights, which a resume takes from the engine's part: comparing lengths is enough.
CHECKSUM_BELOW = 16 << 20
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of an HF Trainer, for ``trainer.train(resume_from_checkpoint=...)``.

    Writes nothing, and reads the newest checkpoint completely (checksums). May be called on every rank: on a shared
    file system all see the same. Rank 0 logs a warning for each newer checkpoint that is not complete.

    Returns:
        The folder ``checkpoint-<step>``; None if no checkpoint is complete, so that training starts anew.
    """
    found, warnings = newest_complete(output_dir)
    for sentence in warnings:
        log_dist(f"grass_ds: {sentence}", ranks=[0], level=logging.WARNING)
    return found


def newest_complete(output_dir: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint, and a sentence for each newer one. Reads only, and logs nothing."""
    skipped: list[str] = []
    used, instead = None, "no earlier one is complete"
    for checkpoint in reversed(checkpoints(output_dir)):
        found = problems(checkpoint)
        if not found:
            used, instead = checkpoint, f"{checkpoint.name} is used instead"
            break
        skipped.append(f"{checkpoint} is not complete: {listed(found)}")
    return used, [f"{text}; {instead}" for text in skipped]


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The Trainer's checkpoint folders, complete or not, by step."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name ``checkpoint-<step>``."""
    return int(checkpoint.name.rpartition("-")[2])


def problems(checkpoint: Path, contents: bool = True) -> list[str]:
    """What is missing or damaged in a checkpoint of the Trainer, as messages; empty if a run can resume from it.

    Without ``contents`` only names and lengths are compared, else checksums: the engine's part is read completely.
    """
    if not checkpoint.is_dir():
        return ["there is no such folder"]
    tag = engine_parts.named_latest(checkpoint)
    try:
        sums = read_seal(checkpoint)
    except ValueError as error:
        return [str(error)]
    if tag is None:
        found = [f"the engine's part was not published ({engine_parts.LATEST} is missing or empty)"]
    else:
        found = [text if tag in text else f"{tag}: {text}" for text in _engine_problems(checkpoint / tag, contents)]
    if sums is None:
        return found + _form_problems(checkpoint, tag)
    compared = (expected.problem(checkpoint / name, contents) for name, expected in sums.items())
    return found + [text for text in compared if text]


def _engine_problems(part: Path, contents: bool) -> list[str]:
    found = engine_parts.problems(part)
    if found or not contents:
        return found
    # Stock DeepSpeed leaves no sums to compare with.
    return engine_parts.corrupt(part) if engine_parts.has_parts(part) else _cut_off(part.iterdir())


def _form_problems(checkpoint: Path, tag: str | None) -> list[str]:
    """Without a seal: the Trainer's files that must be there, and those that end too early."""
    ranks = range(0) if tag is None else engine_parts.ranks_of(checkpoint / tag)
    states = ["rng_state.pth"] if len(ranks) == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    missing = [f"{name} is missing" for name in (TRAINER_STATE, *states) if not (checkpoint / name).is_file()]
    return missing + _cut_off(trainer_files(checkpoint))


def _cut_off(files: Iterable[Path]) -> list[str]:
    """Files that do not end where their format says, as messages."""
    from safetensors import SafetensorError, safe_open

    found = []
    for path in files:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                safe_open(path, framework="pt")
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                raise ValueError("no directory at the end of the archive")
        except (OSError, ValueError, SafetensorError):
            found.append(f"{path.name} is cut off")
    return found


def seal_checkpoint(args: Any, step: int) -> None:
    """Put the Trainer's files of ``checkpoint-<step>`` on disk, then write the seal. Collective, as its OSError is."""
    checkpoint = Path(args.output_dir) / f"checkpoint-{step}"

    def sync_own() -> dict[str, FileSum]:
        own = [checkpoint / ("rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth")]
        if args.should_save:
            own += [path for path in trainer_files(checkpoint) if not path.name.startswith("rng_state")]
        for path in own:
            sync_file(path)
        return {path.name: sum_of(path) for path in own}

    def write() -> None:
        if args.should_save:
            write_seal(checkpoint, {name: sums for part in parts for name, sums in part.items()})
            sync_folder(checkpoint.parent)

    parts = _on_all_ranks(sync_own, args.world_size, checkpoint)
    _on_all_ranks(write, args.world_size, checkpoint)


def _on_all_ranks(task: Callable[[], Any], ranks: int, checkpoint: Path) -> list[Any]:
    """The results of all ranks' ``task``; if one fails, every rank raises."""

    def explained() -> Any:
        try:
            return task()
        except OSError as error:
            raise OSError(f"the checkpoint {checkpoint} could not be completed: {error}") from error

    return gather_from_ranks(explained) if ranks > 1 else [explained()]


def sum_of(path: Path) -> FileSum:
    """Length of a file, and CRC-32 if it has less than :data:`CHECKSUM_BELOW` bytes."""
    size = path.stat().st_size
    return FileSum(size, crc32_of(path) if size < CHECKSUM_BELOW else None)


def trainer_files(checkpoint: Path) -> list[Path]:
    """The files that the Trainer wrote. ``latest`` is the engine's."""
    own = {SEAL, engine_parts.LATEST}
    return [p for p in checkpoint.iterdir() if p.is_file() and p.name not in own and not p.name.startswith(".")]


def write_seal(checkpoint: Path, sums: dict[str, FileSum]) -> None:
    """Write the seal durably. The files must be on disk already."""
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    replace_file(checkpoint / SEAL, json.dumps({"files": files}, indent=1))


def read_seal(checkpoint: Path) -> dict[str, FileSum] | None:
    """File name -> length and CRC-32; None without a seal, ValueError if it is damaged."""
    try:
        files = json.loads((checkpoint / SEAL).read_text())["files"]
        return {name: FileSum(**sums) for name, sums in files.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{SEAL} cannot be read ({error})") from error
