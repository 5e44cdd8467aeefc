# SPDX-License-Identifier: Apache-2.0
"""Refuse at start what cannot work with layer sampling, with reason and remedy, before anything is allocated."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from grass_ds.config import GrassConfig, GrassConfigError
from grass_ds.core import deepspeed_compat
from grass_ds.core.dotted_paths import value_at
from grass_ds.offload.block_io import AioSettings
from grass_ds.sampling.importance import Signal
from grass_ds.sampling.layers import ModelLayers, discover_layers
from grass_ds.sampling.registry import find_sampler
from grass_ds.versions import installed
from grass_ds.zero.outliers import linear_modules
from grass_ds.zero.response_suppression import adapters_of, check_trainable

# Path in the DeepSpeed config -> reason and remedy, then the values that are allowed beside null (default: false).
REFUSED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "zero_optimization.offload_optimizer.device": (
        'optimizer state is moved by the "grass" block: use grass.offload',
        "none",
    ),
    "zero_optimization.offload_optimizer.super_offload": ("SuperOffload replaces our optimizer: use grass.offload",),
    "zero_optimization.cpu_offload": ('optimizer state is moved by the "grass" block: use grass.offload',),
    "zero_optimization.cpu_offload_param": ("deprecated by DeepSpeed: use offload_param.device, on ZeRO stage 3",),
    "zero_optimization.zero_hpz_partition_size": ("a second partition of the weights is kept: set it to 1", 0, 1),
    "zero_optimization.mics_shard_size": ("MiCS shards over groups of their own: remove it", -1, 0),
    "zero_optimization.zenflow": ("ZenFlow replaces our optimizer: remove one of the two", None),
    "zero_optimization.elastic_checkpoint": ("layers have step counts of their own: remove it",),
    "zero_optimization.zero_quantized_weights": ("quantised weights are not supported: remove it",),
    "zero_optimization.zero_quantized_gradients": ("quantised gradients are not supported: remove it",),
    "zero_optimization.zero_quantized_nontrainable_weights": ("inactive layers would be quantised: remove it",),
    "zero_optimization.compute_grad_norm": ("gradient norms decide what is trained: remove it", True),
    "bf16.bf16_master_weights_and_grads": ("master weights are fp32: remove it",),
    "fp16.fp16_master_weights_and_grads": ("master weights are fp32: remove it",),
    "torch_autocast.enabled": ("use bf16 or fp16 instead",),
    "prescale_gradients": ("gradients are averaged by one reduce-scatter: remove it",),
    "gradient_predivide_factor": ("gradients are averaged by one reduce-scatter: remove it", 1.0),
    "sparse_gradients": ("gradients are dense and flat: remove it",),
    "compile.deepcompile": ("DeepCompile captures which layers train: remove it",),
    "hybrid_engine.enabled": ("the hybrid engine is another engine class: remove it",),
    "elasticity.enabled": ("the world size is fixed within a run: remove it",),
    "tensor_parallel.autotp_size": ("tensor parallelism is not supported yet: remove it", 0, 1),
    "checkpoint.async": ("expected true or false", False, True),
    "checkpoint.writer": (
        'grass_ds writes checkpoints: remove it; for a short stall use "checkpoint": {"async": true}',
        None,
    ),
    "checkpoint.use_node_local_storage": ("a checkpoint is one folder for all nodes: remove it",),
    "datastates_ckpt": ('grass_ds writes checkpoints: use "checkpoint": {"async": true}',),
    "expert_parallel.enabled": ("mixture-of-experts parallelism is not supported: remove it",),
}
# Optimizers whose update of an element depends on its tensor: ranks hold flat shards of layers.
_NEED_WHOLE_TENSORS = {"muon", "muonwithauxadam", "adafactor", "lamb", "fusedlamb"}
_NEED_WHOLE_TENSORS |= {"onebitadam", "onebitlamb", "zerooneadam"}


def check_ds_config(ds_config: Mapping[str, Any], config: GrassConfig, optimizer: object = None) -> None:
    """Raise :class:`GrassConfigError` with every setting of ``ds_config`` that does not work with its block.

    ``optimizer``: the client's, which has to work element by element.
    """
    problems = [
        *_stage_problems(ds_config, config),
        *_setting_problems(ds_config),
        *_optimizer_problems(ds_config, optimizer),
    ]
    if config.offload.device == "nvme":
        try:
            AioSettings.parse(value_at(ds_config, "aio") or {})
        except GrassConfigError as error:
            problems.append(str(error))
    if problems:
        first = 'the DeepSpeed config does not go with its "grass" block:'
        raise GrassConfigError("\n  - ".join([first, *problems]))


def _stage_problems(ds_config: Mapping[str, Any], config: GrassConfig) -> Iterator[str]:
    stage = value_at(ds_config, "zero_optimization.stage")
    if stage == 3 and find_sampler(config.sampler).adapters:
        yield (
            f"zero_optimization.stage = 3: grass.sampler = {config.sampler!r} trains adapters, whose weights are few, on "
            "stages 1 and 2; set one of them"
        )
    if stage not in (1, 2, 3):
        yield f"zero_optimization.stage = {stage!r}: layer sampling works on ZeRO stage 1 or 2 or 3; set one of them"
    if stage == 3 and not deepspeed_compat.waits_for_all_gathers():
        yield (
            f"zero_optimization.stage = 3 on CPU ranks with deepspeed {installed('deepspeed')}: it reads gathered "
            "weights before they have arrived, in save_16bit_model() among others; "
            "pip install 'deepspeed>=0.19.8,<0.20', or set stage 1 or 2"
        )
    where = value_at(ds_config, "zero_optimization.offload_param.device") or "none"
    if where not in (("none", "cpu") if stage == 3 else ("none",)):
        yield (
            f"zero_optimization.offload_param.device = {where!r}: weights stay on the device on ZeRO-1/2, and on "
            'ZeRO-3 there or on "cpu": set one of them'
        )


def _setting_problems(ds_config: Mapping[str, Any]) -> Iterator[str]:
    for path, (why, *allowed) in REFUSED_SETTINGS.items():
        value = value_at(ds_config, path)
        if value is not None and value not in (allowed or [False]):
            yield f"{path} = {value!r}: {why}"
    section = ds_config.get("checkpoint", {})
    if not isinstance(section, Mapping):
        yield f"checkpoint = {section!r}: expected an object {{...}}; leave it out for the defaults"


def _optimizer_problems(ds_config: Mapping[str, Any], optimizer: object) -> Iterator[str]:
    kind, client = str(value_at(ds_config, "optimizer.type") or "").lower(), type(optimizer).__name__
    if kind in _NEED_WHOLE_TENSORS:
        yield f"optimizer.type = {kind!r}: needs whole matrices, and ranks hold flat shards; use AdamW"
    if client.lower() in _NEED_WHOLE_TENSORS:
        yield f"the optimizer {client} needs whole matrices, and ranks hold flat shards; use torch.optim.AdamW"


def check_model(model: nn.Module, config: GrassConfig) -> ModelLayers:
    """The layers of a model that can be trained layer by layer in full, or its matrices if the sampler draws these.

    Raises:
        GrassConfigError: adapters, pipeline parallelism or experts, ``expansion_depth`` beyond the layers, settings
            that the sampler refuses, or layers whose outliers it cannot measure.
        ValueError: the layers cannot be found, or ``always_active`` names what the model does not have.
    """
    sampler = find_sampler(config.sampler)
    adapted = any(hasattr(module, "peft_config") for module in model.modules())
    if not sampler.adapters and (adapted or any("lora_" in name for name, _ in model.named_parameters())):
        raise GrassConfigError(
            f"the model is wrapped by PEFT, and grass.sampler = {config.sampler!r} trains full weights. Pass the plain "
            "model, for example peft_model.merge_and_unload(); or train the adapters, those of a few layers at a time by "
            '"sampler": "ist", or all of them without the block "grass"'
        )
    if isinstance(model, deepspeed_compat.PipelineModule):
        raise GrassConfigError("pipeline parallelism has an engine of its own: grass needs the plain model")
    experts = any(getattr(p, "allreduce", True) is False for p in model.parameters())
    if experts or any(type(m).__module__.startswith("deepspeed.moe") for m in model.modules()):
        raise GrassConfigError(
            "the model has DeepSpeed MoE layers, whose gradients are reduced over other groups: not supported"
        )
    layers = discover_layers(model, config.layers_path)
    layers.resolve_always_active(config.always_active)
    if sampler.draws_weights:
        layers = layers.by_weight(model)
    try:
        controller = config.controller(layers)
    except ValueError as error:
        raise GrassConfigError(f"grass.{error}") from error
    if controller.signal is Signal.OUTLIER_RATIO:
        linear_modules(model, layers.names)
    if sampler.adapters:
        adapters_of(model, layers.names)
        check_trainable(model, layers.names)
        _check_outside_adapters(model, layers, config)
    if config.expansion_depth is not None and config.expansion_depth >= len(layers.blocks):
        raise GrassConfigError(
            f"grass.expansion_depth = {config.expansion_depth}: the model has layers 0 to {len(layers.blocks) - 1}; name "
            "one of them, or null for the lowest active layer"
        )
    return layers


def _check_outside_adapters(model: nn.Module, layers: ModelLayers, config: GrassConfig) -> None:
    """Refuse parameters that the user wants trained beside the adapters, and that would not train."""
    always = layers.resolve_always_active(config.always_active)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    for kind, names in layers.outside.items():
        if kind not in always and (lost := sorted(trained & set(names))):
            raise GrassConfigError(
                f"{lost[0]} requires a gradient, but grass.sampler = {config.sampler!r} would never train it: add {kind!r} "
                "to grass.always_active, or freeze it"
            )
