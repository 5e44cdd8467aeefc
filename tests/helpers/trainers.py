# SPDX-License-Identifier: Apache-2.0
"""The HF Trainer inside a rank of the pool, on data whose order every other loop can repeat."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.models import SEQUENCE, VOCAB


class Rows(torch.utils.data.Dataset):
    """``size`` rows of random tokens, each a function of its index alone."""

    def __init__(self, size: int = 128):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, VOCAB, (SEQUENCE,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


@contextmanager
def clean_process() -> Iterator[None]:
    """Undo what accelerate and Transformers leave in the environment and in their singletons."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    environment = dict(os.environ)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(environment)


def _ordered(trainer: type) -> type:
    """A Trainer of an older Transformers that reads its rows in their order."""

    class Ordered(trainer):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    return Ordered


@contextmanager
def hf_trainer(
    config: dict[str, Any], folder: Path | str, model: nn.Module, enabled: bool = True, **arguments: Any
) -> Iterator[Any]:
    """A Trainer on :class:`Rows`, under ``grass_ds.enable()`` unless ``enabled`` is False.

    ``callbacks`` and ``optimizers`` go to the Trainer, all else to ``TrainingArguments``.
    """
    from transformers import Trainer, TrainingArguments

    import grass_ds

    for_trainer = {key: arguments.pop(key) for key in ("callbacks", "optimizers") if key in arguments}
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
    trainer, kind, order = None, Trainer, "train_sampling_strategy"
    if order not in {field.name for field in fields(TrainingArguments)}:  # an older Transformers
        kind = _ordered(Trainer) if settings.pop(order, "random") == "sequential" else Trainer
    with clean_process():
        try:
            with grass_ds.enable() if enabled else nullcontext():
                args = TrainingArguments(deepspeed=config, **settings)
                trainer = kind(model=model, args=args, train_dataset=Rows(), **for_trainer)
                yield trainer
        finally:
            engine = getattr(trainer, "deepspeed", None)
            if engine is not None:
                engine.destroy()


def losses(trainer: Any) -> list[float]:
    """The logged loss of every step: the mean over ranks."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@contextmanager
def losses_seen(model: nn.Module) -> Iterator[list[float]]:
    """The cross-entropy of every micro-batch that this rank trains on, however the loop scales its loss."""
    found: list[float] = []

    def append_loss(_: nn.Module, __: Any, inputs: dict[str, torch.Tensor], output: Any) -> None:
        if not model.training:
            return
        logits, labels = output.logits[:, :-1].flatten(0, 1).detach(), inputs["labels"][:, 1:].flatten()
        found.append(nn.functional.cross_entropy(logits.float(), labels).item())

    handle = model.register_forward_hook(append_loss, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
