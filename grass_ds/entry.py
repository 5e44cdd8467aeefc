# SPDX-License-Identifier: Apache-2.0
"""Ways into DeepSpeed: :func:`initialize` for own loops, :func:`enable` for accelerate, HF Trainer and TRL."""

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.utils import logger

from grass_ds import precision
from grass_ds.cluster import placement
from grass_ds.config import GrassConfig, parse_grass_block
from grass_ds.core import deepspeed_compat
from grass_ds.sampling.layers import ModelLayers
from grass_ds.validation import check_ds_config, check_model, check_optimizer
from grass_ds.versions import RANGES, untested
from grass_ds.zero.engine import GrassEngine

_STOCK_INITIALIZE = deepspeed.initialize
_SIGNATURE = inspect.signature(_STOCK_INITIALIZE)


def initialize(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with the same arguments and the same 4-tuple, whose engine is a :class:`GrassEngine`.

    The engine trains a few layers at a time if the DeepSpeed config has an enabled ``"grass"`` block, and is stock
    otherwise. It is stock, too, without an optimizer, given or named in the config: a reference model, or an
    evaluation. Where there is no process group yet, the ranks find each other under every launcher, plain ``srun
    python`` and ``mpirun python`` included.

    Raises:
        PlacementError: launchers contradict each other, see :func:`grass_ds.cluster.placement.find`.
        ValueError: the block, another setting (GrassConfigError) or the model (LayerDiscoveryError) cannot be used. It
            is raised on every rank, before anything is allocated or a process group is made.
    """
    call = _SIGNATURE.bind(*args, **kwargs)
    ds_config = _ds_config(call.arguments)
    return _initialize(call, ds_config, _grass_config(ds_config, call.arguments))


initialize.__signature__ = _SIGNATURE  # type: ignore[attr-defined]


def enable() -> ExitStack:
    """Make ``deepspeed.initialize`` read the ``"grass"`` block, so that HF Trainer, accelerate and TRL work unchanged.

    Call ``grass_ds.enable()`` once, before the Trainer is built; calling it again changes nothing. As a context manager
    it ends with the ``with`` block: ``with grass_ds.enable(): trainer.train()``. Code that has run
    ``from deepspeed import initialize`` before keeps the stock function; call :func:`initialize` there.

    Returns:
        A context manager that gives ``deepspeed.initialize`` back as it was found, at its end or at ``close()``.
    """
    undo = ExitStack()
    undo.callback(setattr, deepspeed, "initialize", deepspeed.initialize)
    deepspeed.initialize = _initialize_if_asked
    return undo


def _initialize_if_asked(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    call = _SIGNATURE.bind(*args, **kwargs)
    ds_config = _ds_config(call.arguments)
    config = _grass_config(ds_config, call.arguments)
    return _STOCK_INITIALIZE(*args, **kwargs) if config is None else _initialize(call, ds_config, config)


def _initialize(
    call: inspect.BoundArguments, ds_config: Mapping[str, Any], config: GrassConfig | None
) -> tuple[Any, Any, Any, Any]:
    """``deepspeed.initialize`` with a :class:`GrassEngine` that samples layers by ``config``; None: a stock one."""
    layers = None if config is None else _check(call.arguments, ds_config, config)
    if not dist.is_initialized():
        placement.find().export()
    _warn_of_untested_versions()
    with _engine_built_by(partial(GrassEngine, grass_config=config, layers=layers)):
        made = _STOCK_INITIALIZE(*call.args, **call.kwargs)
    _warn_of_emulation(made[0])
    return made


@contextmanager
def _engine_built_by(build: Any) -> Iterator[None]:
    """``deepspeed.initialize`` looks up the engine class in its module: let it find ``build`` there for one call."""
    stock, deepspeed.DeepSpeedEngine = deepspeed.DeepSpeedEngine, build
    try:
        yield
    finally:
        deepspeed.DeepSpeedEngine = stock


@cache
def _warn_of_untested_versions() -> None:
    """Log one line on rank 0 about the packages that this process has loaded."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    loaded = [name for name in RANGES if name == "python" or name in sys.modules]
    if rank == 0 and (sentence := untested(loaded)):
        logger.warning(sentence)


def _warn_of_emulation(engine: Any) -> None:
    """Warn on rank 0 before the first step of a dtype that the device emulates: it makes steps many times slower."""
    if getattr(engine, "grass", None) is not None and engine.global_rank == 0:
        name = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        with suppress(torch.OutOfMemoryError):  # a full device cannot be measured, but may well train
            precision.warn_if_emulated(name)


def _ds_config(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The DeepSpeed config of a call, read from its file where the call names one; empty if the call has none."""
    named = [arguments.get(name) for name in ("config", "config_params")]
    named += [getattr(arguments.get("args"), name, None) for name in ("deepspeed_config", "deepscale_config")]
    config: Any = next(filter(None, named), {})
    return config if isinstance(config, Mapping) else deepspeed_compat.load_ds_config(config)


def _grass_config(ds_config: Mapping[str, Any], arguments: Mapping[str, Any]) -> GrassConfig | None:
    """The ``"grass"`` block of a call that trains; None: the engine is to be stock.

    Front-ends prepare reference models and evaluations with a copy of the training config from which they took the
    optimizer.
    """
    section = ds_config.get("optimizer")
    named = isinstance(section, Mapping) and section.get("type") is not None
    return parse_grass_block(ds_config) if named or arguments.get("optimizer") is not None else None


def _check(arguments: Mapping[str, Any], ds_config: Mapping[str, Any], config: GrassConfig) -> ModelLayers | None:
    """Refuse mistakes before DeepSpeed starts; return the model's layers, None without a model."""
    check_ds_config(ds_config, config)
    model, optimizer = arguments.get("model"), arguments.get("optimizer")
    if isinstance(optimizer, torch.optim.Optimizer):
        check_optimizer(optimizer)
    return None if model is None else check_model(model, config)
