# SPDX-License-Identifier: Apache-2.0
"""Ways into DeepSpeed: :func:`initialize` for own loops, :func:`enable` for accelerate, HF Trainer and TRL."""

import inspect
import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
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
from grass_ds.plan.budget import fit_active_layers
from grass_ds.validation import check_ds_config, check_model
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
    return _initialize(args, kwargs, always=True)


initialize.__signature__ = _SIGNATURE  # type: ignore[attr-defined]


def enable() -> ExitStack:
    """Make ``deepspeed.initialize`` read the ``"grass"`` block, so that HF Trainer, accelerate and TRL work unchanged.

    Call it once, before the Trainer is built; calling it again changes nothing. Code that has run
    ``from deepspeed import initialize`` before keeps the stock function; call :func:`initialize` there.

    Returns:
        A context manager that gives ``deepspeed.initialize`` back as it was found, at its end or at ``close()``.
    """
    return _replaced("initialize", _initialize_if_asked)


def _initialize_if_asked(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    return _initialize(args, kwargs, always=False)


def _initialize(args: tuple[Any, ...], kwargs: dict[str, Any], always: bool) -> tuple[Any, Any, Any, Any]:
    """``always``: build a :class:`GrassEngine` also for a call that samples no layers, as a stock engine."""
    arguments = _SIGNATURE.bind(*args, **kwargs).arguments
    ds_config = _ds_config(arguments)
    config = _grass_config(ds_config, arguments)
    if config is None and not always:
        return _STOCK_INITIALIZE(*args, **kwargs)
    layers, model = None, arguments.get("model")
    if config is not None:
        check_ds_config(ds_config, config, arguments.get("optimizer"))
        layers = None if model is None else check_model(model, config)
    place, planned = None if dist.is_initialized() else placement.find(), ""
    if config is not None and config.memory_budget is not None and model is not None:
        ranks = dist.get_world_size() if place is None else place.world_size
        config, found = fit_active_layers(model, config, ds_config, ranks)
        planned = f"{config.num_active_layers} layers at a time, {found.total / 1e9:.2f} GB of {config.memory_budget}"
    if place is not None:
        place.export()
    _warn_of_untested_versions()
    # deepspeed.initialize looks up the engine class in its module.
    with _replaced("DeepSpeedEngine", partial(GrassEngine, grass_config=config, layers=layers)):
        made = _STOCK_INITIALIZE(*args, **kwargs)
    if planned and made[0].global_rank == 0:
        logger.info(f"grass_ds: memory_budget: {planned} planned")
    _warn_of_emulation(made[0])
    return made


def _replaced(name: str, value: Any) -> ExitStack:
    """Replace ``deepspeed.<name>`` until the end of the returned context manager."""
    undo = ExitStack()
    undo.callback(setattr, deepspeed, name, getattr(deepspeed, name))
    setattr(deepspeed, name, value)
    return undo


@cache
def _warn_of_untested_versions() -> None:
    """Log one line on rank 0 about the packages that this process has loaded."""
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    loaded = [name for name in RANGES if name == "python" or name in sys.modules]
    if rank == 0 and (sentence := untested(loaded)):
        logger.warning(sentence)


def _warn_of_emulation(engine: Any) -> None:
    """Warn on rank 0 of a dtype that the device emulates: it makes steps many times slower."""
    if getattr(engine, "grass", None) is not None and engine.global_rank == 0:
        name = "bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32"
        with suppress(torch.OutOfMemoryError):  # a full device cannot be measured, but may well train
            precision.warn_if_emulated(name)


def _ds_config(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """The DeepSpeed config of a call, read from its file if need be; empty if the call has none."""
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
