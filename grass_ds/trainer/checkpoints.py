# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the HF Trainer on disk: from which of them a run can resume.

[Note: Trainer checkpoints] ``checkpoint-<step>/`` has two parts. The engine's part is a folder that ``latest`` names.
It becomes visible as a whole, with asynchronous saving some time later. The other files are the Trainer's, each
written in place, so a killed job leaves some of them missing or cut off. ``GrassCallback`` therefore adds a last file,
the seal (:mod:`~grass_ds.trainer.seal`). A checkpoint is complete when both parts are. Without a seal (no callback, or
killed just before it) the form of the files is checked.
"""

import json
import logging
import os
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.utils import log_dist

from grass_ds.checkpoint import folder as engine_parts
from grass_ds.core.durable_files import listed
from grass_ds.trainer.seal import read_seal, seal_problems, trainer_files

TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete checkpoint of an HF Trainer, for ``trainer.train(resume_from_checkpoint=...)``.

    Writes nothing, and reads the newest checkpoint completely (checksums). May be called on every rank: on a shared
    file system all see the same. Rank 0 logs a warning for each newer checkpoint that is not complete.

    Returns:
        The folder ``checkpoint-<step>``; None if no checkpoint is complete, so that training starts anew.
    """
    found, skipped = newest_complete(output_dir)
    for sentence in explain(found, skipped):
        log_dist(f"grass_ds: {sentence}", ranks=[0], level=logging.WARNING)
    return found


def newest_complete(output_dir: str | os.PathLike[str]) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest complete checkpoint, and the newer ones with their problems. Reads only, and logs nothing."""
    skipped: dict[Path, list[str]] = {}
    for checkpoint in reversed(checkpoints(output_dir)):
        found = problems(checkpoint)
        if not found:
            return checkpoint, skipped
        skipped[checkpoint] = found
    return None, skipped


def explain(used: Path | None, skipped: Mapping[Path, Sequence[str]]) -> list[str]:
    """A sentence for each skipped checkpoint: its problems, and the checkpoint that is used instead."""
    instead = "no earlier one is complete" if used is None else f"{used.name} is used instead"
    return [f"{checkpoint} is not complete: {listed(found)}; {instead}" for checkpoint, found in skipped.items()]


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The Trainer's checkpoint folders, complete or not, by step."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in the name ``checkpoint-<step>``."""
    return int(checkpoint.name.rpartition("-")[2])


def problems(checkpoint: Path, contents: bool = True) -> list[str]:
    """What is missing or damaged in a checkpoint of the Trainer, as messages; empty if a run can resume from it.

    Args:
        contents: compare checksums, which reads the engine's part completely; else only names and lengths.
    """
    if not checkpoint.is_dir():
        return ["there is no such folder"]
    try:
        sums = read_seal(checkpoint)
    except ValueError as error:
        return [str(error)]
    found = _engine_problems(checkpoint, contents) + _state_problems(checkpoint)
    found += _form_problems(checkpoint) if sums is None else seal_problems(checkpoint, sums, contents)
    return list(dict.fromkeys(found))


# ---- what each part must be -----------------------------------------------------------------------------------------


def _engine_problems(checkpoint: Path, contents: bool) -> list[str]:
    latest = checkpoint / engine_parts.LATEST
    tag = latest.read_text().strip() if latest.is_file() else ""
    if not tag:
        return [
            f"the engine's part was not published ({engine_parts.LATEST} {'is empty' if latest.is_file() else 'is missing'})"
        ]
    part = checkpoint / tag
    found = engine_parts.problems(part)
    if not found and engine_parts.has_parts(part):
        found = engine_parts.corrupt(part) if contents else []
    elif not found:  # stock DeepSpeed: no sums to compare with
        files = sorted(part.glob("*.pt"))
        found = [f"{path.name} is cut off" for path in files if not zipfile.is_zipfile(path)]
        found = found if files else [f"{tag} has no files"]
    return [f"{tag}: {text}" if tag not in text else text for text in found]


def _state_problems(checkpoint: Path) -> list[str]:
    try:
        state: Any = json.loads((checkpoint / TRAINER_STATE).read_text())
        return [] if isinstance(state["global_step"], int) else [f"{TRAINER_STATE} has no step"]
    except FileNotFoundError:
        return [f"{TRAINER_STATE} is missing"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{TRAINER_STATE} cannot be read ({error})"]


def _form_problems(checkpoint: Path) -> list[str]:
    """Without a seal: the Trainer's files that must be there, and those that end too early."""
    files = trainer_files(checkpoint)
    names = {path.name for path in files}
    found = [f"{name} is missing" for name in _random_states(checkpoint) if name not in names]
    for path in files:
        if path.suffix in (".pt", ".pth", ".bin"):
            whole = zipfile.is_zipfile(path)
        else:
            whole = path.suffix != ".safetensors" or _whole_safetensors(path)
        found += [] if whole else [f"{path.name} is cut off"]
    return found


def _random_states(checkpoint: Path) -> list[str]:
    """The files of random state, one per rank that wrote the engine's part; none if that does not say how many there
    were.
    """
    latest = checkpoint / engine_parts.LATEST
    ranks = engine_parts.ranks_of(checkpoint / latest.read_text().strip()) if latest.is_file() else range(0)
    return ["rng_state.pth"] if len(ranks) == 1 else [f"rng_state_{rank}.pth" for rank in ranks]


def _whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header (8 bytes of length, JSON) says."""
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = file.read(length) if 0 < length <= path.stat().st_size else b""
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(text).items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)
