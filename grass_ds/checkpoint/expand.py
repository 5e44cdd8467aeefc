# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m grass_ds expand``: a checkpoint whose optimizer states are fp32, for DeepSpeed's tools."""

import shutil
from pathlib import Path
from typing import IO, cast

import torch

from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint import state
from grass_ds.checkpoint.part import Part, SummedFile
from grass_ds.core.deepspeed_compat import checkpoint_keys as keys

_STATES = "optim_states.pt"


def expand(checkpoint: Path, output: Path) -> int:
    """Copy a checkpoint (``<save_dir>/<tag>``), with its compact states as fp32: 12 bytes per weight with AdamW.

    The copy is what a run with ``offload.state_format`` fp32 would have saved: ``zero_to_fp32.py`` and
    ``ds_to_universal.py`` read it, and any format continues from it. Memory: one rank's states in fp32 at a time.

    Returns:
        the number of ranks whose states were compact.

    Raises:
        ValueError: the checkpoint is incomplete or not of grass_ds, or ``output`` exists.
    """
    if not folders.has_parts(checkpoint):
        raise ValueError(f"{checkpoint}: no checkpoint of grass_ds; name a folder <save_dir>/<tag>")
    if found := folders.problems(checkpoint):
        raise ValueError(f"{checkpoint}: {found[0]}; choose a checkpoint that is complete")
    if output.exists():
        raise ValueError(f"{output}: exists; name a folder that does not")
    parts = [Part.read(checkpoint, rank) for rank in folders.ranks_of(checkpoint)]
    written = {Part.name(part.rank) for part in parts} | {n for p in parts for n in p.files if n.endswith(_STATES)}
    shutil.copytree(checkpoint, output, ignore=lambda _, names: written & set(names))
    return sum([_expand_part(part, checkpoint, output) for part in parts])


def _expand_part(part: Part, checkpoint: Path, output: Path) -> bool:
    compact = False
    for name in [name for name in part.files if name.endswith(_STATES)]:
        content = torch.load(checkpoint / name, map_location="cpu", weights_only=False)  # it holds a loss scaler
        saved = content[keys.OPTIMIZER_STATE_DICT]
        compact = compact or state.is_compact(saved)
        state.expand(saved)
        with SummedFile(output / name) as file:
            torch.save(content, cast(IO[bytes], file))
        part.files[name] = file.sums
    part.write(output)
    return compact
