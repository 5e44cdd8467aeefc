# SPDX-License-Identifier: Apache-2.0
"""``grass_trainer.json``, the seal of a Trainer's checkpoint: lengths and checksums of the Trainer's files.

It is written after them, so a checkpoint that has it was written completely.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grass_ds.checkpoint.folder import LATEST
from grass_ds.core.agreement import gather_from_ranks
from grass_ds.core.durable_files import replace_file, sync_file, sync_folder

SEAL = "grass_trainer.json"
# Larger files of the Trainer hold weights, which a resume takes from the engine's part: comparing lengths is enough.
CHECKSUM_BELOW = 16 << 20

Sums = dict[str, tuple[int, "int | None"]]
"""File name -> length in bytes and CRC-32 of the content, None for files of :data:`CHECKSUM_BELOW` bytes and more."""


def seal_checkpoint(args: Any, step: int) -> None:
    """Put the Trainer's files of ``checkpoint-<step>`` on disk, then write the seal. Collective.

    Args:
        args: the Trainer's ``TrainingArguments``.

    Raises:
        OSError: a file could not be put on disk; RankFailedError on the other ranks.
    """
    checkpoint = Path(str(args.output_dir)) / f"checkpoint-{step}"
    rank, ranks = args.process_index, args.world_size
    own = [checkpoint / ("rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth")]

    def sync_own() -> Sums:
        if args.should_save:
            others = {f"rng_state_{other}.pth" for other in range(ranks)}
            own.extend(p for p in trainer_files(checkpoint) if p not in own and p.name not in others)
        for path in own:
            sync_file(path)
        return {path.name: sum_of(path) for path in own}

    def write() -> Sums:
        if args.should_save:
            write_seal(checkpoint, sums)
            sync_folder(checkpoint.parent)
        return sums

    sums = _on_all_ranks(sync_own, ranks, checkpoint)
    _on_all_ranks(write, ranks, checkpoint)


def _on_all_ranks(task: Callable[[], Sums], ranks: int, checkpoint: Path) -> Sums:
    """The results of all ranks' ``task``, merged; if one fails, every rank raises."""

    def explained() -> Sums:
        try:
            return task()
        except OSError as error:
            raise OSError(f"the checkpoint {checkpoint} could not be completed: {error}") from error

    parts = gather_from_ranks(explained) if ranks > 1 else [explained()]
    return {name: sums for part in parts for name, sums in part.items()}


def sum_of(path: Path) -> tuple[int, int | None]:
    """Length and CRC-32 of a file, see :data:`Sums`."""
    size = path.stat().st_size
    return size, zlib.crc32(path.read_bytes()) if size < CHECKSUM_BELOW else None


def trainer_files(checkpoint: Path) -> list[Path]:
    """The files that the Trainer wrote. ``latest`` is the engine's."""
    own = {SEAL, LATEST}
    return sorted(p for p in checkpoint.iterdir() if p.is_file() and p.name not in own and not p.name.startswith("."))


def write_seal(checkpoint: Path, sums: Sums) -> None:
    """Write the seal durably. The files must be on disk already."""
    files = {name: {"bytes": size, "crc32": crc32} for name, (size, crc32) in sorted(sums.items())}
    replace_file(checkpoint / SEAL, json.dumps({"files": files}, indent=1))


def read_seal(checkpoint: Path) -> Sums | None:
    """The content of the seal; None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        files = json.loads((checkpoint / SEAL).read_text())["files"]
        return {name: (int(sums["bytes"]), sums["crc32"]) for name, sums in files.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{SEAL} cannot be read ({error})") from error


def seal_problems(checkpoint: Path, sums: Sums, contents: bool) -> list[str]:
    """Files that differ from the seal, as messages; with ``contents`` checksums are compared, too."""
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
