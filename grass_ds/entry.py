# SPDX-License-Identifier: Apache-2.0
"""Ways into DeepSpeed: :func:`initialize` for own loops, :func:`enable` for accelerate, HF Trainer and TRL."""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from grass_ds import precision
from grass_ds.cluster import placement
from grass_ds.config import GrassConfig, parse_grass_block
from grass_ds.core import deepspeed_compat
from grass_ds.sampling.layers import discover_layers
from grass_ds.validation import check_ds_config, check_model, check_optimizer
from grass_ds.versions import RANGES, untested
from grass_ds.zero.engine import GrassEngine

_STOCK_INITIALIZE = deepspeed.initialize
_SIGNATURE = inspect.signature(_STOCK_INITIALIZE)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with the same arguments and the same 4-tuple, whose engine is a :class:`GrassEngine`.

    The engine trains a few layers at a time if the DeepSpeed config has an enabled ``"grass"`` block, and is stock otherwise. Without an
    optimizer, given or named in the config, it is stock, too: a reference model, or an evaluation. Where there is no process group yet, the ranks find each other under every launcher, plain ``srun python`` and ``mpirun python`` included.

    Raises:
        PlacementError: launchers contradict each other, see :func:`grass_ds.cluster.placement.find`.
        GrassConfigError: the block, the rest of the config or the model cannot be used; before anything is allocated or any
            process group is made, and alike on every rank.
    """
    bound = _SIGNATURE.bind(*args, **kwargs).arguments
    _check(bound)
    if not dist.is_initialized():
        placement.find().export()
    _warn_of_untested_versions()
    with _engine_class():
        made = _STOCK_INITIALIZE(*args, **kwargs)
    _warn_of_emulation(made[0])
    return made


initialize.__signature__ = _SIGNATURE  # type: ignore[attr-defined]


class enable:
    """Make every later ``deepspeed.initialize`` honour a ``"grass"`` block: HF Trainer, accelerate and TRL then work unchanged.

    ``grass_ds.enable()`` once, before the Trainer is built, is all; calling it again changes nothing. As a context manager it
    ends with the block: ``with grass_ds.enable(): trainer.train()``. Code that did ``from deepspeed import initialize`` earlier
    keeps the stock function; call :func:`initialize` there.
    """

    def __init__(self) -> None:
        self._previous = deepspeed.initialize
        deepspeed.initialize = _initialize_if_asked

    def __enter__(self) -> "enable":
        return self

    def __exit__(self, *_: object) -> None:
        deepspeed.initialize = self._previous


def _initialize_if_asked(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    wanted = _wanted_block(_SIGNATURE.bind(*args, **kwargs).arguments) is not None
    return initialize(*args, **kwargs) if wanted else _STOCK_INITIALIZE(*args, **kwargs)


@contextmanager
def _engine_class() -> Iterator[None]:
    """``deepspeed.initialize`` looks the engine class up in its module: for the length of the call it finds ours."""
    stock, deepspeed.DeepSpeedEngine = deepspeed.DeepSpeedEngine, GrassEngine
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine = stock


@cache
def _warn_of_untested_versions() -> None:
    """One line on rank 0, of what this process has loaded."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    loaded = [name for name in RANGES if name == "python" or name in sys.modules]
    if rank == 0 and (sentence := untested(loaded)):
        logger.warning(sentence)


def _warn_of_emulation(engine: Any) -> None:
    """A dtype that the device emulates makes every step many times slower: rank 0 says so, before the first."""
    if getattr(engine, "grass", None) is not None and engine.global_rank == 0:
        name = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        with suppress(torch.OutOfMemoryError):  # a full device cannot be measured, but may well train
            precision.warn_if_emulated(name)


def _ds_config(arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
    config = arguments.get("config") or arguments.get("config_params")
    config = config or getattr(arguments.get("args"), "deepspeed_config", None)
    return config if config is None or isinstance(config, Mapping) else deepspeed_compat.load_ds_config(config)


def _wanted_block(arguments: Mapping[str, Any]) -> GrassConfig | None:
    """The ``"grass"`` block of a call that trains; None: the engine is to be stock.

    Front-ends prepare reference models and evaluations with a copy of the training config from which they took the optimizer.
    """
    config = _ds_config(arguments) or {}
    section = config.get("optimizer")
    named = isinstance(section, Mapping) and section.get("type") is not None
    return parse_grass_block(config) if named or arguments.get("optimizer") is not None else None


def _check(arguments: Mapping[str, Any]) -> None:
    """Everything that can be refused before DeepSpeed starts."""
    config, block = _ds_config(arguments), _wanted_block(arguments)
    if config is None or block is None:
        return
    check_ds_config(config)
    model, optimizer = arguments.get("model"), arguments.get("optimizer")
    if isinstance(optimizer, torch.optim.Optimizer):
        check_optimizer(optimizer)
    if model is not None:
        check_model(model)
        layers = discover_layers(model, block.layers_path)
        layers.resolve_always_active(block.always_active)
