# SPDX-License-Identifier: Apache-2.0
"""The HF Trainer inside a rank of the pool, on a data set whose order every loop can repeat."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.models import SEQUENCE, VOCAB

ROWS = 64


class Rows(torch.utils.data.Dataset):
    """``size`` rows of random tokens, each a function of its index alone."""

    def __init__(self, size: int = ROWS):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCAB, (SEQUENCE,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


@contextmanager
def hf_trainer(config: dict[str, Any] | str, folder: Path | str, model: nn.Module, **arguments: Any) -> Iterator[Any]:
    """A Trainer under ``grass_ds.enable()``; what HF leaves behind in the process is gone after the ``with`` block.

    ``callbacks``, ``optimizers`` and ``cls`` go to the Trainer, the rest to ``TrainingArguments``.
    """
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    import grass_ds

    environment = dict(os.environ)
    for_trainer = {key: arguments.pop(key) for key in ("callbacks", "optimizers", "train_dataset") if key in arguments}
    for_trainer.setdefault("train_dataset", Rows())
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 11,
        **arguments,
    }
    trainer = None
    try:
        with grass_ds.enable():
            trainer = Trainer(model=model, args=TrainingArguments(deepspeed=config, **settings), **for_trainer)
            yield trainer
    finally:
        engine = getattr(trainer, "deepspeed", None)
        if engine is not None:
            engine.destroy()
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(environment)


def losses(trainer: Any) -> list[float]:
    """The loss of every logged step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
