# SPDX-License-Identifier: Apache-2.0
"""All private names of DeepSpeed that grass_ds uses, checked at import, and the differences between its releases.

DeepSpeed has no public way to add a ZeRO optimizer. ``tests/core/test_deepspeed_compat.py`` checks what the names do.
Other modules import from ``deepspeed`` only what its documentation shows: ``initialize``, ``comm``,
``get_accelerator``, ``logger`` and ``log_dist``.
"""

import copy
import dis
import importlib
import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from grass_ds.versions import RANGES


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# What GrassEngine overrides or calls, with arguments. _configure_checkpointing sets checkpoint_engine, and
# _configure_zero_optimizer is also called without an optimizer, for the hooks of ZeRO-3.
ENGINE_METHODS = _names("""
    _configure_checkpointing _configure_zero_optimizer _copy_recovery_script _do_optimizer_sanity_check
    _load_checkpoint _save_zero_checkpoint _take_model_step _zero3_consolidated_16bit_state_dict
    load_module_state_dict module_state_dict
""")
# What grass_ds reads of an engine: methods without arguments, and properties.
ENGINE_READS = _names("""
    aio_config bfloat16_enabled communication_data_type dynamic_loss_scale dynamic_loss_scale_args fp16_enabled
    get_data_types gradient_clipping is_compiled load_universal_checkpoint loss_scale zero_optimization_stage
    zero_overlap_comm
""")
# What DeepSpeedEngine sets on itself, and grass_ds reads or sets.
ENGINE_ATTRIBUTES = _names("""
    _compile_kwargs _config _is_compiled checkpoint_engine config device global_rank global_steps gradient_average
    module_forward_post_hook module_forward_pre_hook optimizer param_names seq_data_parallel_group seq_dp_world_size
""")
# What the gradient hook of a ZeRO optimizer must call, in this order.
HOOK_STATE = _names("""
    should_refresh_expected_hook_count reenter_backward_if_needed update_hook_state_and_maybe_run_epilogue
    clear_backward_seen_flag enter_backward register_grad_acc_post_hook _max_expected_hooks_seen
""")
# What DeepSpeed reads of a ZeRO optimizer or of its parameters, and ours provide.
PROVIDED = _names("_global_grad_norm _restore_from_bit16_weights _hp_mapping _z3_optimizer")
# ZeRO-3: the class that gathers and releases weights. release_backward_leftovers came with 0.19.3; for older releases
# see docs/compatibility.md.
OFFLOAD_METHODS = _names("""
    _register_deepspeed_module destroy empty_partition_cache get_param_coordinator partition_all_parameters
    release_backward_leftovers
""")
OFFLOAD_ATTRIBUTES = _names("module param_coordinator persistent_parameters")
# ZeRO-3: attributes that it leaves on every module, see remove_zero3_hooks().
LEFT_ON_MODULES = _names("pre_bwd_fn post_bwd_fn")
# ZeRO-3: its coordinator. The first is private and cached, see clear_release_cache().
COORDINATOR = _names("""
    _PartitionedParameterCoordinator__params_to_release _clear_trace_structures _invalidate_trace is_complete_trace
    is_invalid_trace
""")
# ZeRO-3: how several weights are gathered at once, see waits_for_all_gathers().
GATHERING = _names("_allgather_params_coalesced")
# ZeRO-3: attributes of a partitioned parameter.
PARTITIONED_PARAMETER = _names("""
    all_gather_coalesced ds_active_sub_modules ds_numel ds_persist ds_shape ds_status ds_tensor partition
""")
# module -> names
MODULE_NAMES = {
    "deepspeed": _names("DeepSpeedEngine initialize"),
    "deepspeed.checkpoint.constants": _names("""
        BASE_OPTIMIZER_STATE CLIP_GRAD DS_VERSION FP32_FLAT_GROUPS FROZEN_PARAM_FRAGMENTS GROUP_PADDINGS LOSS_SCALER
        OPTIMIZER_STATE_DICT PARAM PARAM_SLICE_MAPPINGS PARTITION_COUNT SINGLE_PARTITION_OF_FP32_GROUPS
        UNIVERSAL_CHECKPOINT_INFO UNIVERSAL_CHECKPOINT_VERSION_KEY UNIVERSAL_CHECKPOINT_VERSION_VALUE ZERO_STAGE
    """),
    "deepspeed.pipe": ("PipelineModule",),
    "deepspeed.runtime.checkpoint_engine": ("TorchCheckpointEngine",),
    "deepspeed.runtime.config": ("DeepSpeedConfigError",),
    "deepspeed.runtime.config_utils": ("DeepSpeedConfigModel",),
    "deepspeed.runtime.engine": ("BFLOAT16", "ZERO_OPTIMIZATION"),
    "deepspeed.runtime.fp16.loss_scaler": ("CreateLossScaler",),
    "deepspeed.runtime.swap_tensor.aio_config": ("AIO_DEFAULT_DICT",),
    "deepspeed.runtime.tensor_parallel.init_utils": ("load_ds_config",),
    "deepspeed.runtime.utils": ("count_used_parameters_in_backward",),
    "deepspeed.runtime.zero.parameter_offload": ("DeepSpeedZeRoOffload",),
    "deepspeed.runtime.zero.partition_parameters": ("GatheredParameters", "Init", "ZeroParamStatus"),
    "deepspeed.runtime.zero.partitioned_param_coordinator": ("PartitionedParameterCoordinator",),
    "deepspeed.utils.groups": ("_get_sequence_parallel_world_size",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
    "deepspeed.utils.torch": ("register_grad_hook",),
    "deepspeed.utils.zero_to_fp32": ("get_fp32_state_dict_from_zero_checkpoint",),
}


def silence_renamed_collectives() -> None:
    """Filter torch's warnings (2.13 and 2.14) about the old names of two collectives, which DeepSpeed 0.19.8 uses."""
    names = "all_gather_into_tensor|reduce_scatter_tensor"
    warnings.filterwarnings("ignore", rf"`torch\.distributed\.({names})` is deprecated", FutureWarning)


def missing_names() -> list[str]:
    """Names of the lists above that the installed DeepSpeed does not have."""
    missing: list[str] = []
    for module, names in MODULE_NAMES.items():
        try:
            missing += _lacking(module + ".{}", dir(importlib.import_module(module)), names)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("deepspeed"):
                raise  # a package that DeepSpeed needs is not there
            missing.append(module)
    return missing or _missing_in_classes()


def _missing_in_classes() -> list[str]:
    """Names that DeepSpeed's classes do not have, or do not set on objects."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload as Hooks
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    missing_methods = [
        *_lacking("DeepSpeedEngine.{}", dir(DeepSpeedEngine), (*ENGINE_METHODS, *ENGINE_READS)),
        *_lacking("ZeROOptimizer.{}", dir(ZeROOptimizer), HOOK_STATE),
        *_lacking("DeepSpeedZeRoOffload.{}", dir(Hooks), OFFLOAD_METHODS),
        *_lacking("PartitionedParameterCoordinator.{}", dir(PartitionedParameterCoordinator), COORDINATOR),
        *_lacking("Init.{}", dir(Init), GATHERING),
    ]
    set_on_parameters = Init._convert_to_deepspeed_param.__code__.co_names
    return missing_methods or [  # some of those methods set these
        *_lacking("DeepSpeedEngine.{}", assigned_by(DeepSpeedEngine), ENGINE_ATTRIBUTES),
        *_lacking("DeepSpeedZeRoOffload.{}", assigned_by(Hooks), OFFLOAD_ATTRIBUTES),
        *_lacking("Module.{} (ZeRO-3)", assigned_by(Hooks), LEFT_ON_MODULES),
        *_lacking("Parameter.{} (ZeRO-3)", set_on_parameters, PARTITIONED_PARAMETER),
    ]


def _lacking(shown: str, present: Collection[str], names: Collection[str]) -> list[str]:
    return [shown.format(name) for name in names if name not in present]


def assigned_by(cls: type) -> set[str]:
    """Attributes that the methods of ``cls`` and of its bases set, on ``self`` or on anything else."""
    values = [value for base in cls.__mro__ for value in vars(base).values()]
    functions = [inspect.unwrap(value) for value in values if inspect.isfunction(value)]
    code = [instruction for function in functions for instruction in dis.get_instructions(function)]
    return {str(instruction.argval) for instruction in code if instruction.opname == "STORE_ATTR"}


def check() -> None:
    """Raise ImportError when the installed DeepSpeed lacks a name that grass_ds relies on."""
    if missing := missing_names():
        wanted = f"deepspeed{RANGES['deepspeed']}"
        raise ImportError(
            f"grass_ds needs names that deepspeed {deepspeed.__version__} does not have: {', '.join(missing)}. "
            f"They are in {wanted}: pip install '{wanted}'"
        )


check()

# Imported after the check. Other modules import these names from here.
from deepspeed.checkpoint import constants as checkpoint_keys
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from deepspeed.runtime.engine import BFLOAT16, ZERO_OPTIMIZATION
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler as create_loss_scaler
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.tensor_parallel.init_utils import load_ds_config
from deepspeed.runtime.utils import count_used_parameters_in_backward
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init, ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import zero_to_fp32
from deepspeed.utils.groups import _get_sequence_parallel_world_size as sequence_parallel_size
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.torch import register_grad_hook

# ---- differences between releases -----------------------------------------------------------------------------------

try:
    from deepspeed.utils.pin_memory import get_native_pinned_memory
except ModuleNotFoundError as error:
    if error.name != "deepspeed.utils.pin_memory":
        raise
    get_native_pinned_memory = None  # before 0.19.6


def register_host_memory(address: int, nbytes: int) -> bool:
    """Page-lock ``nbytes`` bytes at ``address``; RuntimeError if the driver refuses.

    False if it cannot be done: before DeepSpeed 0.19.6 only on CUDA.
    """
    accelerator = get_accelerator()
    if hasattr(accelerator, "register_host_memory"):
        return bool(accelerator.register_host_memory(address, nbytes))
    if accelerator.device_name() != "cuda":
        return False
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)))
    return True


def unregister_host_memory(address: int) -> None:
    """Undo :func:`register_host_memory`, where that returned true."""
    accelerator = get_accelerator()
    if hasattr(accelerator, "unregister_host_memory"):
        accelerator.unregister_host_memory(address)
    else:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(address)))


def waits_for_all_gathers() -> bool:
    """Whether ``GatheredParameters`` waits until all weights have arrived. Looks at the code: releases can be patched.

    Before 0.19.8 it waits for its last gather only. On a device stream the others are complete by then; over gloo they
    may not be, and ``save_16bit_model()`` may save garbage.
    """
    if get_accelerator().device_name() != "cpu":
        return True
    return "launch_handles[-1].wait()" not in inspect.getsource(Init._allgather_params_coalesced)


# ---- workarounds ----------------------------------------------------------------------------------------------------


def clear_release_cache() -> None:
    """Clear ZeRO-3's cache of which weights to release after which module.

    It belongs to the class: its entries are wrong after a new trace, and keep models alive. DeepSpeed wraps the cached
    method without ``functools.wraps``: only the wrapper's variables have it.
    """
    wrapper = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for value in inspect.getclosurevars(wrapper).nonlocals.values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def without_trace(coordinator: PartitionedParameterCoordinator) -> PartitionedParameterCoordinator:
    """Another coordinator of the same weights, without a trace. Gathers in flight belong to both."""
    fresh = copy.copy(coordinator)
    if not fresh.is_invalid_trace():
        fresh._invalidate_trace()  # also waits for gathers in flight
    fresh._clear_trace_structures()  # or both would append to the same lists
    return fresh


def remove_zero3_hooks(offload: DeepSpeedZeRoOffload) -> None:
    """Remove ZeRO-3's hooks. DeepSpeed's ``destroy()`` leaves two on every module: the next engine would use them."""
    offload.destroy()
    for module in offload.module.modules():
        for name in LEFT_ON_MODULES:
            vars(module).pop(name, None)


def mark_compiled(engine: Any, compile_kwargs: Mapping[str, Any]) -> None:
    """Set the attributes that ``engine.compile()`` sets and ``engine.is_compiled`` reads."""
    engine._is_compiled, engine._compile_mode, engine._compile_kwargs = True, "model", dict(compile_kwargs)
