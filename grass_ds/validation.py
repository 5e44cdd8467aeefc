# SPDX-License-Identifier: Apache-2.0
"""Refuse at start what cannot work with layer sampling, with reason and remedy, before anything is allocated."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.core import deepspeed_compat
from grass_ds.offload.block_io import AioSettings
from grass_ds.sampling.layers import ModelLayers, discover_layers
from grass_ds.versions import installed

SUPPORTED_STAGES = (1, 2, 3)

# (path in the DeepSpeed config, allowed values, reason and remedy)
REFUSED_SETTINGS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    (
        "zero_optimization.offload_optimizer.device",
        (None, "none"),
        'optimizer state is moved by the "grass" block: use grass.offload',
    ),
    (
        "zero_optimization.offload_optimizer.super_offload",
        (None, False),
        "SuperOffload replaces the same optimizer wrapper: remove it, and use grass.offload",
    ),
    (
        "zero_optimization.cpu_offload",
        (None, False),
        'optimizer state is moved by the "grass" block: use grass.offload',
    ),
    (
        "zero_optimization.cpu_offload_param",
        (None, False),
        "a name of the past: use offload_param.device, on ZeRO stage 3",
    ),
    (
        "zero_optimization.zero_hpz_partition_size",
        (None, 0, 1),
        "a second partition of the weights is kept: set it to 1",
    ),
    ("zero_optimization.mics_shard_size", (None, -1, 0), "MiCS shards over groups of their own: remove it"),
    ("zero_optimization.zenflow", (None,), "ZenFlow replaces the same optimizer wrapper: remove one of the two"),
    ("zero_optimization.elastic_checkpoint", (None, False), "layers have step counts of their own: remove it"),
    ("zero_optimization.zero_quantized_weights", (None, False), "quantised weights are not supported: remove it"),
    ("zero_optimization.zero_quantized_gradients", (None, False), "quantised gradients are not supported: remove it"),
    (
        "zero_optimization.zero_quantized_nontrainable_weights",
        (None, False),
        "inactive layers would be quantised: remove it",
    ),
    ("zero_optimization.compute_grad_norm", (None, True), "gradient norms decide what is trained: remove it"),
    ("bf16.bf16_master_weights_and_grads", (None, False), "master weights are fp32: remove it"),
    ("fp16.fp16_master_weights_and_grads", (None, False), "master weights are fp32: remove it"),
    ("torch_autocast.enabled", (None, False), "use bf16 or fp16 instead"),
    ("prescale_gradients", (None, False), "gradients are averaged by one reduce-scatter: remove it"),
    ("gradient_predivide_factor", (None, 1.0), "gradients are averaged by one reduce-scatter: remove it"),
    ("sparse_gradients", (None, False), "gradients are dense and flat: remove it"),
    ("compile.deepcompile", (None, False), "DeepCompile captures which layers train: remove it"),
    ("hybrid_engine.enabled", (None, False), "the hybrid engine is another engine class: remove it"),
    ("elasticity.enabled", (None, False), "the world size is fixed within a run: remove it"),
    ("tensor_parallel.autotp_size", (None, 0, 1), "tensor parallelism is not supported yet: remove it"),
    ("checkpoint.async", (None, False, True), "expected true or false"),
    (
        "checkpoint.writer",
        (None,),
        'checkpoints are written by grass_ds: remove it; for a short stall use "checkpoint": {"async": true}',
    ),
    (
        "checkpoint.use_node_local_storage",
        (None, False),
        "a checkpoint is published when the files of all ranks are there: save to a folder that all nodes share",
    ),
    (
        "datastates_ckpt",
        (None, False),
        'checkpoints are written by grass_ds: use "checkpoint": {"async": true}',
    ),
    ("expert_parallel.enabled", (None, False), "mixture-of-experts parallelism is not supported: remove it"),
)
# Optimizers whose update of an element depends on its tensor: ranks hold flat shards of layers.
_NEED_WHOLE_TENSORS = (
    "muon",
    "muonwithauxadam",
    "adafactor",
    "lamb",
    "fusedlamb",
    "onebitadam",
    "onebitlamb",
    "zerooneadam",
)


def _lookup(config: Mapping[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def check_ds_config(ds_config: Mapping[str, Any], config: GrassConfig) -> None:
    """Raise :class:`GrassConfigError` with every setting that does not work with the ``"grass"`` block.

    Args:
        ds_config: the whole DeepSpeed config.
        config: its parsed ``"grass"`` block.
    """
    problems = [*_stage_problems(ds_config), *_setting_problems(ds_config), *_optimizer_problems(ds_config)]
    if config.offload.device == "nvme":
        try:
            AioSettings.parse(_lookup(ds_config, "aio") or {})
        except GrassConfigError as error:
            problems.append(str(error))
    if problems:
        raise GrassConfigError(
            'the DeepSpeed config does not go with its "grass" block:\n  - ' + "\n  - ".join(problems)
        )


def _stage_problems(ds_config: Mapping[str, Any]) -> Iterator[str]:
    stage = _lookup(ds_config, "zero_optimization.stage")
    if stage not in SUPPORTED_STAGES:
        wanted = " or ".join(map(str, SUPPORTED_STAGES))
        yield f"zero_optimization.stage = {stage!r}: layer sampling works on ZeRO stage {wanted}; set one of them"
    if stage == 3 and not deepspeed_compat.waits_for_all_gathers():
        yield (
            f"zero_optimization.stage = 3 on CPU ranks with deepspeed {installed('deepspeed')}: it reads gathered "
            "weights before they have arrived, in save_16bit_model() among others; "
            "pip install 'deepspeed>=0.19.8,<0.20', or set stage 1 or 2"
        )
    where = _lookup(ds_config, "zero_optimization.offload_param.device") or "none"
    if where not in (("none", "cpu") if stage == 3 else ("none",)):
        yield (
            f"zero_optimization.offload_param.device = {where!r}: weights stay on the device on ZeRO-1/2, and on "
            'ZeRO-3 there or on "cpu": set one of them'
        )


def _setting_problems(ds_config: Mapping[str, Any]) -> Iterator[str]:
    for path, allowed, why in REFUSED_SETTINGS:
        value = _lookup(ds_config, path)
        if value not in allowed:
            yield f"{path} = {value!r}: {why}"
    section = ds_config.get("checkpoint", {})
    if not isinstance(section, Mapping):
        yield f"checkpoint = {section!r}: expected an object {{...}}; leave it out for the defaults"


def _optimizer_problems(ds_config: Mapping[str, Any]) -> Iterator[str]:
    kind = str(_lookup(ds_config, "optimizer.type") or "").lower()
    if kind in _NEED_WHOLE_TENSORS:
        yield f"optimizer.type = {kind!r}: needs whole matrices, and ranks hold flat shards; use AdamW"


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Raise :class:`GrassConfigError` for a client optimizer that does not work element by element."""
    name = type(optimizer).__name__
    if name.lower() in _NEED_WHOLE_TENSORS:
        raise GrassConfigError(
            f"the optimizer {name} needs whole matrices, and ranks hold flat shards; use torch.optim.AdamW"
        )


def check_model(model: nn.Module, config: GrassConfig) -> ModelLayers:
    """Refuse a model that cannot be trained layer by layer in full.

    Returns:
        The layers of the model.

    Raises:
        GrassConfigError: adapters, pipeline parallelism or experts.
        ValueError: the layers cannot be found, or ``always_active`` names what the model does not have.
    """
    _refuse_adapters(model)
    if isinstance(model, deepspeed_compat.PipelineModule):
        raise GrassConfigError("pipeline parallelism has an engine of its own: grass needs the plain model")
    experts = any(getattr(p, "allreduce", True) is False for p in model.parameters())
    if experts or any(type(m).__module__.startswith("deepspeed.moe") for m in model.modules()):
        raise GrassConfigError(
            "the model has DeepSpeed MoE layers, whose gradients are reduced over other groups: not supported"
        )
    layers = discover_layers(model, config.layers_path)
    layers.resolve_always_active(config.always_active)
    return layers


def _refuse_adapters(model: nn.Module) -> None:
    adapted = any(hasattr(module, "peft_config") for module in model.modules())
    if adapted or any("lora_" in name for name, _ in model.named_parameters()):
        raise GrassConfigError(
            "the model is wrapped by PEFT: grass trains full weights. Pass the plain model, for example "
            'peft_model.merge_and_unload(), or remove the block "grass" to train the adapter'
        )
