# SPDX-License-Identifier: Apache-2.0
"""Universal checkpoints: the output of DeepSpeed's ``ds_to_universal.py``, to resume with another number of ranks.

Each tensor has a file of its own, ``zero/<parameter>/<fp32 | exp_avg | exp_avg_sq>.pt``, and is not sharded. From
ZeRO-3 it is flat; from other stages it has its shape, and the file says how to cut it for tensor parallelism.
``zero/optimizer_state.pt`` holds the rest of rank 0's state dict, after ZeRO-3 all of it. Files are memory-mapped, so
that a rank reads only the part that it owns.
"""

import pickle
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_ds.core.deepspeed_compat import checkpoint_keys as keys
from grass_ds.core.durable_files import listed
from grass_ds.core.units import Unit, whole_numel
from grass_ds.offload.state_template import MOMENT_KEYS

WEIGHTS = "fp32"


@dataclass(frozen=True)
class UniversalCheckpoint:
    """The folder ``<load_dir>/<tag>`` that the converter wrote.

    Methods raise ValueError if a file is missing, cannot be read, or holds another number of elements.
    """

    folder: Path

    def common(self) -> dict[str, Any]:
        """Rank 0's state dict of the optimizer, for what belongs to no single parameter; tensors are memory-mapped."""
        return _read(self.folder / "zero" / "optimizer_state.pt", weights_only=False)  # it holds a loss scaler

    def check(self, moments: Mapping[Unit, Sequence[str]]) -> None:
        """Check that every file exists that will be read: the weights of all units, and these ``moments`` of each."""
        left = {name for names in moments.values() for name in names} - set(MOMENT_KEYS)
        if left:
            raise ValueError(
                f"universal checkpoints hold {' and '.join(MOMENT_KEYS)}, but this optimizer also keeps {', '.join(sorted(left))}, "
                "which the converter drops; resume with as many ranks as saved the checkpoint, or load the weights alone with "
                "load_checkpoint(..., load_module_only=True)"
            )
        files = [
            self._file(n, key) for unit, keep in moments.items() for n in unit.param_names for key in (WEIGHTS, *keep)
        ]
        if missing := [str(path) for path in files if not path.is_file()]:
            raise ValueError(
                f"the universal checkpoint lacks {listed(missing, most=1)}; convert it again, or load one of this model"
            )

    def shard(self, unit: Unit, key: str) -> torch.Tensor:
        """This rank's shard of one state of the unit: float32, [shard_numel], in host memory, padded with zeros."""
        shard = torch.zeros(unit.shard_numel)
        for slot, name in enumerate(unit.param_names):
            in_param, in_shard, numel = unit.overlap(slot)
            if numel:
                whole = _tensor_in(self._file(name, key), unit.sizes[slot])
                shard.narrow(0, in_shard, numel).copy_(whole.narrow(0, in_param, numel))
        return shard

    def restore_untrained(self, module: nn.Module, owned: Collection[str], rank: int) -> None:
        """Load what DeepSpeed skips: buffers, and parameters not ``owned`` by the optimizer (the user froze them).

        They are in the model files, as the saving ranks wrote them: one file per rank in ZeRO-3, else one. Parameters
        that are not in those files (``exclude_frozen_parameters``) keep their values. In ZeRO-3 all parameters must be
        partitioned. ``rank`` is that in the data-parallel group.
        """
        files = self.folder.glob("*mp_rank_00_model_states.pt")
        in_rank_order = sorted(files, key=lambda path: (len(path.name), path.name))  # rank 10 after rank 9
        saved = [_read(path, weights_only=False) for path in in_rank_order]
        with torch.no_grad():
            for name, param in module.named_parameters():
                if name not in owned and (whole := _assembled(saved, name, whole_numel(param))) is not None:
                    _copy_into(param, whole, rank)
            for name, buffer in module.named_buffers():
                if name in saved[0]["module"]:
                    buffer.copy_(saved[0]["module"][name])

    def _file(self, parameter: str, key: str) -> Path:
        return self.folder / "zero" / parameter / f"{key}.pt"


def _tensor_in(path: Path, numel: int) -> torch.Tensor:
    content = _read(path)
    tensor = content[keys.PARAM] if isinstance(content, dict) else content
    if tensor.numel() != numel:
        raise ValueError(
            f"{path} holds {tensor.numel()} elements, the parameter has {numel}; load a checkpoint of this model"
        )
    return tensor.reshape(-1)


def _assembled(saved: Sequence[dict[str, Any]], name: str, numel: int) -> torch.Tensor | None:
    """A frozen parameter, flat, put together from the model files; None if they do not hold it."""
    parts = [(content.get(keys.FROZEN_PARAM_FRAGMENTS) or content["module"]).get(name) for content in saved]
    if not all(isinstance(part, torch.Tensor) and part.numel() for part in parts):  # left out, or an empty stand-in
        return None
    whole = torch.cat([part.reshape(-1) for part in parts])
    if whole.numel() != -(-numel // len(parts)) * len(parts):  # the parts of ZeRO-3 are padded
        raise ValueError(f"{name}: the checkpoint holds {whole.numel()} elements, the parameter has {numel}")
    return whole[:numel]


def _copy_into(param: nn.Parameter, whole: torch.Tensor, rank: int) -> None:
    partition = getattr(param, "ds_tensor", None)
    if partition is None:
        param.data.copy_(whole.view(param.shape))
    else:
        part = whole[rank * partition.numel() :][: partition.numel()]
        partition.data[: part.numel()].copy_(part)


def _read(path: Path, weights_only: bool = True) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: is this a folder that ds_to_universal.py wrote?") from error
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read ({error}); convert the checkpoint again") from error
