"""Find out before training whether the trained model can be saved."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from launch import adapters, distributed

logger = logging.getLogger(__name__)

# Values of a generation config that only sampling uses, and what says nothing.
_SAMPLING = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}


def make_savable(config: Any, name: str) -> None:
    """Mend sampling values without `do_sample`, which transformers reads but refuses to save.

    A file that says nothing of `do_sample` gets `do_sample: true`: whoever wrote the values meant them to be used, and
    all are kept. Where it says false, or the temperature is 0, greedy generation is meant, which never used the
    values: they are dropped.

    Args:
        config: the model's `generation_config`, changed in place.
        name: of the model.

    Raises:
        ValueError: whatever else transformers finds wrong, in its words.
    """
    where = f"--model {name}: generation_config.json"
    set_values = {key: getattr(config, key, None) for key, nothing in _SAMPLING.items()}
    idle = {key: value for key, value in set_values.items() if value is not None and value != _SAMPLING[key]}
    if idle and config.do_sample is not True:
        if config.do_sample is None and idle.get("temperature") != 0:
            config.do_sample, what = True, "the saved model gets do_sample: true"
        else:
            for key in idle:
                setattr(config, key, None)
            config.do_sample, what = False, "the saved model goes without them, since greedy generation ignores them"
        if distributed.rank() == 0:
            values = ", ".join(f"{key}: {value}" for key, value in idle.items())
            logger.warning("%s sets %s without do_sample: true; %s", where, values, what)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"{where} could not be saved with the trained model, correct it first: {error}") from error


def check_saving(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, zero: Mapping[str, Any]
) -> None:
    """Find out before training whether the trained model can be saved, and say in which form. For one rank.

    Args:
        zero: "zero_optimization" of the DeepSpeed config.

    Raises:
        ValueError: see `rehearse_saving`.
    """
    rehearse_saving(model, tokenizer, folder)
    check_space(model, folder)
    if zero.get("stage") == 3 and not zero.get("stage3_gather_16bit_weights_on_model_save"):
        print(
            "the trained model will be saved as a DeepSpeed checkpoint, which zero_to_fp32.py in it converts: for a "
            'model folder set "stage3_gather_16bit_weights_on_model_save": true',
            flush=True,
        )


def rehearse_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write all of a model but its weights into a folder and remove it again: what cannot be saved is found in time.

    Args:
        folder: where the trained model will be saved; made if it is missing. For one rank.

    Raises:
        ValueError: the folder cannot be written, or a part of the model cannot be saved.
    """
    parts = {"config": model.config, "generation config": model.generation_config, "tokenizer": tokenizer}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".rehearsal-", dir=folder) as rehearsal:
            for what, part in parts.items():
                _save_part(what, part, rehearsal)
    except OSError as error:
        raise ValueError(f"--output_dir {folder}: cannot be written: {error}; choose another folder") from error


def _save_part(what: str, part: Any, folder: str) -> None:
    try:
        part.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a tokenizer or a config may come with code of its own
        raise ValueError(
            f"the model's {what} cannot be saved, so the trained model could not be: {type(error).__name__}: {error}"
        ) from error


def check_space(model: PreTrainedModel, folder: Path) -> None:
    """Warn if the folder's file system has less room than the weights to save take: the adapters', or the model's.

    No error: not every file system tells its free space.

    Args:
        folder: where the trained model will be saved; it exists. Weights in it count as room, since they are replaced.
    """
    saved = adapters.parameters(model) if adapters.is_adapted(model) else model.parameters()
    needed = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in saved)
    room = shutil.disk_usage(folder).free + sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if room < needed:
        logger.warning(
            "--output_dir %s: the trained model takes %.2f GB, but there is room for %.2f GB",
            folder,
            needed / 1e9,
            room / 1e9,
        )
