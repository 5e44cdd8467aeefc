# SPDX-License-Identifier: Apache-2.0
"""``memory_budget``: the largest number of active layers that fits, by the plan of a model that is there."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.core.sizes import parse_bytes
from grass_ds.plan.model_shape import ModelShape
from grass_ds.plan.predict import predict
from grass_ds.plan.prediction import Prediction
from grass_ds.plan.run_shape import run_shape
from grass_ds.plan.search import largest
from grass_ds.precision import DTYPES


def fit_active_layers(
    model: nn.Module, config: GrassConfig, ds_config: Mapping[str, Any], ranks: int
) -> tuple[GrassConfig, Prediction]:
    """The config with the most active layers whose planned device memory is within ``config.memory_budget``.

    A function of its arguments, and of the linear layers of the process ([Note: Kernels] in plan/activations.py), so
    that all ranks get the same.

    Args:
        model: of Hugging Face; its config is read, not its weights.
        ds_config: without "auto".
        ranks: of the job.

    Returns:
        the config, and the plan of the run.

    Raises:
        GrassConfigError: not even one layer fits, or the model cannot be planned.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        raise GrassConfigError(
            f"grass.memory_budget: {type(model).__name__} has no Hugging Face config, by which its memory is planned; set "
            "grass.num_active_layers"
        )
    checkpointing = bool(getattr(model, "is_gradient_checkpointing", False))
    assert config.memory_budget is not None
    assert config.row_length is not None
    run = run_shape(ds_config, ranks, config.row_length, checkpointing)
    try:
        eager = getattr(model.config, "_attn_implementation", None) == "eager"
        shape = ModelShape(model.config, DTYPES[run.dtype], "eager" if eager else "sdpa")

        def plan(count: int) -> Prediction:
            return predict(shape, replace(run, grass=_with_layers(config, count)))

        budget = parse_bytes(config.memory_budget)
        found = largest(lambda count: plan(count).total <= budget, len(shape.layers.blocks))
        made = plan(max(1, found))
    except ValueError as error:
        raise GrassConfigError(f"grass.memory_budget: {error}; set grass.num_active_layers") from error
    if found == 0:
        parts = ", ".join(f"{name} {nbytes / 1e9:.2f}" for name, nbytes in made.device.items() if nbytes)
        raise GrassConfigError(
            f"grass.memory_budget = {config.memory_budget}: one layer at a time, {run.micro_batch} rows of {run.sequence} "
            f"tokens, ZeRO stage {run.stage} on {ranks} rank(s) need {made.total / 1e9:.2f} GB ({parts}); use fewer rows "
            "or tokens, activation checkpointing, ZeRO stage 3 or more ranks"
        )
    return _with_layers(config, found), made


def _with_layers(config: GrassConfig, count: int) -> GrassConfig:
    return config.model_copy(update={"num_active_layers": count})
