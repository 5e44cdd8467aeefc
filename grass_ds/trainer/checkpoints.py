# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the HF Trainer on disk: which of them a run can be resumed from.

[Note: Trainer checkpoints] ``checkpoint-<step>/`` is written by two. The engine's part, a folder that ``latest`` names, becomes visible
as a whole, perhaps later and in the background. The files beside it are the Trainer's, each written in place, so a killed job leaves
some of them out or cut off. ``GrassCallback`` therefore adds a last file, the seal, which says what the Trainer's files must be. A
checkpoint is complete when both parts are; without a seal (no callback, or killed just before it) the files are judged by their form.
"""

import json
import logging
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.utils import log_dist

from grass_ds.checkpoint import folder as engine_parts
from grass_ds.core.durable_files import listed, replace_file

SEAL = "grass_trainer.json"
TRAINER_STATE = "trainer_state.json"
# Larger files of the Trainer hold weights, which a resume takes from the engine's part: their length must do.
CHECKSUM_BELOW = 16 << 20
_NAME = re.compile(r"checkpoint-(\d+)")

Sums = dict[str, tuple[int, "int | None"]]
"""File name -> length in bytes and CRC-32 of the content, None for files of :data:`CHECKSUM_BELOW` bytes and more."""


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest complete ``checkpoint-<step>`` of an HF Trainer's output folder, for ``trainer.train(resume_from_checkpoint=...)``.

    Reads only, the newest checkpoint as a whole (checksums). May be called on every rank: they see the same on a shared file system.
    Each newer checkpoint that is not complete is logged as a warning on rank 0: what is wrong with it, and which is used instead.

    Returns:
        None if there is no complete one, so that the run starts from the beginning.
    """
    found, skipped = newest_complete(output_dir)
    for sentence in explain(found, skipped):
        log_dist(f"grass_ds: {sentence}", ranks=[0], level=logging.WARNING)
    return found


def newest_complete(output_dir: str | os.PathLike[str]) -> tuple[Path | None, dict[Path, list[str]]]:
    """The newest complete checkpoint, and the newer ones with what is wrong with them. Reads only, and tells nobody."""
    skipped: dict[Path, list[str]] = {}
    for checkpoint in reversed(checkpoints(output_dir)):
        found = problems(checkpoint)
        if not found:
            return checkpoint, skipped
        skipped[checkpoint] = found
    return None, skipped


def explain(used: Path | None, skipped: Mapping[Path, Sequence[str]]) -> list[str]:
    """A sentence for each skipped checkpoint: what is wrong with it, and what is used instead."""
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
    """What is missing or damaged in a checkpoint of the Trainer; nothing if a run can be resumed from it.

    Args:
        contents: compare checksums, which reads the engine's part as a whole; else only what is there and how long it is.
    """
    if not checkpoint.is_dir():
        return ["there is no such folder"]
    try:
        sums = _read_seal(checkpoint)
    except ValueError as error:
        return [str(error)]
    found = _engine_problems(checkpoint, contents) + _state_problems(checkpoint)
    found += _form_problems(checkpoint) if sums is None else _seal_problems(checkpoint, sums, contents)
    return list(dict.fromkeys(found))


# ---- the seal --------------------------------------------------------------------------------------------------------------


def sum_of(path: Path) -> tuple[int, int | None]:
    """What a file is now, see :data:`Sums`."""
    size = path.stat().st_size
    return size, zlib.crc32(path.read_bytes()) if size < CHECKSUM_BELOW else None


def trainer_files(checkpoint: Path) -> list[Path]:
    """The files beside the engine's part. ``latest`` is the engine's, and may come later."""
    own = {SEAL, engine_parts.LATEST}
    return sorted(p for p in checkpoint.iterdir() if p.is_file() and p.name not in own and not p.name.startswith("."))


def write_seal(checkpoint: Path, sums: Sums) -> None:
    """Say durably what the Trainer's files are. They have to be on disk already."""
    files = {name: {"bytes": size, "crc32": crc32} for name, (size, crc32) in sorted(sums.items())}
    replace_file(checkpoint / SEAL, json.dumps({"files": files}, indent=1))


def _read_seal(checkpoint: Path) -> Sums | None:
    try:
        files = json.loads((checkpoint / SEAL).read_text())["files"]
        return {name: (int(sums["bytes"]), sums["crc32"]) for name, sums in files.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{SEAL} cannot be read ({error})") from error


def _seal_problems(checkpoint: Path, sums: Sums, contents: bool) -> list[str]:
    found = []
    for name, (size, crc32) in sums.items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} of {size} bytes")
        elif contents and sum_of(path)[1] != crc32:
            found.append(f"{name} is not what was written (checksum)")
    return found


# ---- what each part must be ------------------------------------------------------------------------------------------------


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
    """The files of random state, one per rank that wrote the engine's part; none if that does not say how many there were."""
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
