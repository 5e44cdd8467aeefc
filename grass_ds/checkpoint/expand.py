# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m grass_ds expand``: a checkpoint whose optimizer states are fp32, for DeepSpeed's tools."""

import shutil
from pathlib import Path

import torch

from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint import state
from grass_ds.checkpoint.part import Part, write_summed
from grass_ds.core.deepspeed_compat import checkpoint_keys as keys

_STATES = "optim_states.pt"


def expand(checkpoint: Path, output: Path) -> int:
    """Copy a checkpoint (``<save_dir>/<tag>``), with its compact states as fp32: 12 bytes per weight with AdamW.

    The copy is what a run with ``offload.state_format`` fp32 would have saved: ``zero_to_fp32.py`` and
    ``ds_to_universal.py`` read it, and any format continues from it. Memory: one rank's states in fp32 at a time.

    Returns:
        the number of ranks whose states were compact.

    Raises:
        ValueError: the checkpoint is incomplete, damaged or not of grass_ds, or ``output`` exists.
        OSError: ``output`` cannot be written, as on a full disk; nothing of it is left.
    """
    if not folders.has_parts(checkpoint):
        raise ValueError(f"{checkpoint}: no checkpoint of grass_ds; name a folder <save_dir>/<tag>")
    if found := folders.problems(checkpoint) or folders.corrupt(checkpoint):
        raise ValueError(f"{checkpoint}: {found[0]}; choose a checkpoint that is complete")
    if output.exists():
        raise ValueError(f"{output}: exists; name a folder that does not")
    parts = [Part.read(checkpoint, rank) for rank in folders.ranks_of(checkpoint)]
    compact = [part for part in parts if part.state_format != "fp32"]
    written = {Part.name(part.rank) for part in compact} | {n for part in compact for n in _states(part)}
    try:
        shutil.copytree(checkpoint, output, ignore=lambda _, names: written & set(names))
        for part in compact:
            _expand_part(part, checkpoint, output)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    return len(compact)


def _states(part: Part) -> list[str]:
    return [name for name in part.files if name.endswith(_STATES)]


def _expand_part(part: Part, checkpoint: Path, output: Path) -> None:
    for name in _states(part):
        content = torch.load(checkpoint / name, map_location="cpu", weights_only=False)  # it holds a loss scaler
        state.expand(content[keys.OPTIMIZER_STATE_DICT])
        part.files[name] = write_summed(content, output / name)
    part.state_format = "fp32"
    part.write(output)
