# SPDX-License-Identifier: Apache-2.0
"""The private names of DeepSpeed in ``core/deepspeed_compat.py`` do what grass_ds expects of them."""

import importlib
import inspect
import types
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from helpers.models import batch, ds_config, engine_of, tiny_llama, train
from packaging.version import Version
from torch import nn

from grass_ds.core import deepspeed_compat
from grass_ds.versions import RANGES


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


# ---- the check ------------------------------------------------------------------------------------------------------


def warnings_of_collectives() -> dict[str, list[str]]:
    """torch's warnings of the collectives' names that DeepSpeed uses: of a direct call, and in a run of ours."""
    from deepspeed import comm as dist

    whole, part = torch.zeros(2 * dist.get_world_size()), torch.zeros(2)
    said = {}
    with warnings.catch_warnings(record=True) as bare:
        warnings.simplefilter("always")
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        said["bare"] = [str(one.message) for one in bare if one.category is FutureWarning]
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        with engine_of(ds_config(grass={"sampler": "uniform"})) as engine:
            train(engine, 1)
        said["ours"] = [str(one.message) for one in ours if one.category is FutureWarning]
    return said


@pytest.mark.dist
def test_renamed_collectives_are_not_the_users_business(two_ranks: Any) -> None:
    """Where torch no longer warns, or DeepSpeed knows the new names, nothing is left to silence."""
    for said in two_ranks.run(warnings_of_collectives):
        assert len(said["bare"]) == 2 * hasattr(torch.distributed.reduce_scatter_tensor, "__deprecated__")
        assert said["ours"] == []


LISTED = [
    *(
        (deepspeed_compat.DeepSpeedEngine, name, f"DeepSpeedEngine.{name}")
        for name in (*deepspeed_compat.ENGINE_METHODS, *deepspeed_compat.ENGINE_READS)
    ),
    *((deepspeed_compat.ZeROOptimizer, name, f"ZeROOptimizer.{name}") for name in deepspeed_compat.HOOK_STATE),
    *((module, name, f"{module}.{name}") for module, names in deepspeed_compat.MODULE_NAMES.items() for name in names),
    *(
        (deepspeed_compat.DeepSpeedZeRoOffload, name, f"DeepSpeedZeRoOffload.{name}")
        for name in deepspeed_compat.OFFLOAD_METHODS
    ),
    *(
        (PartitionedParameterCoordinator, name, f"PartitionedParameterCoordinator.{name}")
        for name in deepspeed_compat.COORDINATOR
    ),
]


def complaint() -> str:
    """What ``deepspeed_compat.check`` raises, if it does."""
    try:
        deepspeed_compat.check()
    except ImportError as error:
        return str(error)
    return "nothing"


def test_missing_names_are_named() -> None:
    said = {}
    for owner, name, shown in LISTED:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.delattr(importlib.import_module(owner) if isinstance(owner, str) else owner, name)
            said[shown] = complaint()
    remedy = f"pip install 'deepspeed{RANGES['deepspeed']}'"
    assert {
        shown: text for shown, text in said.items() if f"does not have: {shown}. " not in text or remedy not in text
    } == {}


SET_BY = [
    *(
        (deepspeed_compat.DeepSpeedZeRoOffload, "__init__", n, f"DeepSpeedZeRoOffload.{n}")
        for n in deepspeed_compat.OFFLOAD_ATTRIBUTES
    ),
    *(
        (Init, "_convert_to_deepspeed_param", n, f"Parameter.{n} (ZeRO-3)")
        for n in deepspeed_compat.PARTITIONED_PARAMETER
    ),
    *(
        (deepspeed_compat.DeepSpeedZeRoOffload, "_register_deepspeed_module", n, f"Module.{n} (ZeRO-3)")
        for n in deepspeed_compat.LEFT_ON_MODULES
    ),
]


def test_attributes_that_are_no_longer_set_are_named() -> None:
    said = {}
    for owner, setter, name, shown in SET_BY:
        function = getattr(owner, setter)
        code = function.__code__
        renamed = code.replace(co_names=tuple(f"{n}_now" if n == name else n for n in code.co_names))
        assert renamed.co_names != code.co_names
        with mock.patch.object(owner, setter, types.FunctionType(renamed, {}, closure=function.__closure__)):
            said[shown] = complaint()
    assert {shown: text for shown, text in said.items() if f"does not have: {shown}. " not in text} == {}


def test_no_version_is_refused_by_its_number() -> None:
    for version in ("0.18.6", "0.19.9+local", "0.20.0"):
        with mock.patch.object(deepspeed, "__version__", version):
            assert complaint() == "nothing"


def accelerator_of(device: str) -> Any:
    """DeepSpeed's accelerator as before 0.19.6, which cannot register host memory."""
    return mock.patch.object(
        deepspeed_compat, "get_accelerator", return_value=types.SimpleNamespace(device_name=lambda: device)
    )


def test_host_memory_is_registered_with_cuda_where_the_accelerator_has_no_method() -> None:
    def refuse(status: int) -> None:
        if status:
            raise RuntimeError("out of page-locked memory")

    runtime = mock.Mock(**{"cudaHostRegister.return_value": 0, "cudaHostUnregister.return_value": 0})
    with (
        accelerator_of("cuda"),
        mock.patch.object(torch.cuda, "cudart", return_value=runtime),
        mock.patch.object(torch.cuda, "check_error", refuse),
    ):
        assert deepspeed_compat.register_host_memory(4096, 8192)
        deepspeed_compat.unregister_host_memory(4096)
        assert runtime.mock_calls == [mock.call.cudaHostRegister(4096, 8192, 0), mock.call.cudaHostUnregister(4096)]
        runtime.cudaHostRegister.return_value = 2
        with pytest.raises(RuntimeError, match="page-locked"):
            deepspeed_compat.register_host_memory(4096, 8192)
    with accelerator_of("xpu"):  # nothing registers it: it stays pageable
        assert deepspeed_compat.register_host_memory(4096, 8192) is False


def waits_for_the_last() -> None:
    launch_handles: list[Any] = []
    launch_handles[-1].wait()


def waits_for_each() -> None:
    for handle in ():
        handle.wait()


@pytest.mark.parametrize(
    ("device", "gathers", "safe"),
    [("cpu", waits_for_the_last, False), ("cpu", waits_for_each, True), ("cuda", waits_for_the_last, True)],
)
def test_which_gathers_are_waited_for(device: str, gathers: Callable[[], None], safe: bool) -> None:
    with accelerator_of(device), mock.patch.object(Init, "_allgather_params_coalesced", gathers):
        assert deepspeed_compat.waits_for_all_gathers() is safe


def test_the_releases_that_wait_for_all_gathers_are_known() -> None:
    """The remedy names the first of them."""
    with accelerator_of("cpu"):
        assert deepspeed_compat.waits_for_all_gathers() == (Version(deepspeed.__version__) >= Version("0.19.8"))


# ---- names that need no ranks ---------------------------------------------------------------------------------------


def test_methods_that_are_overridden_take_what_we_pass_on() -> None:
    engine = deepspeed_compat.DeepSpeedEngine
    assert parameters(engine._configure_zero_optimizer) == ["self", "optimizer"]
    assert parameters(engine._do_optimizer_sanity_check) == ["self", "basic_optimizer"]
    assert parameters(engine._take_model_step)[:2] == ["self", "lr_kwargs"]
    assert "exclude_frozen_parameters" in parameters(engine.module_state_dict)
    assert "exclude_frozen_parameters" in parameters(engine._zero3_consolidated_16bit_state_dict)


def test_checkpoint_keys_are_those_that_deepspeeds_tools_read() -> None:
    from deepspeed.utils import zero_to_fp32

    keys = deepspeed_compat.checkpoint_keys
    for name in (
        "FP32_FLAT_GROUPS",
        "OPTIMIZER_STATE_DICT",
        "PARTITION_COUNT",
        "SINGLE_PARTITION_OF_FP32_GROUPS",
        "ZERO_STAGE",
    ):
        assert getattr(zero_to_fp32, name) == getattr(keys, name)
    names = set(deepspeed_compat.MODULE_NAMES["deepspeed.checkpoint.constants"]) - {
        "UNIVERSAL_CHECKPOINT_VERSION_VALUE"
    }
    assert len({getattr(keys, name) for name in names}) == len(names)
    assert all(isinstance(getattr(keys, name), str) for name in names)


def test_loss_scaler_adapts_only_in_fp16() -> None:
    arguments: dict[str, Any] = {
        "init_scale": 16.0,
        "scale_window": 2,
        "min_scale": 1,
        "delayed_shift": 1,
        "consecutive_hysteresis": False,
    }
    dynamic = deepspeed_compat.create_loss_scaler(torch.float16, 1.0, True, arguments)
    assert isinstance(dynamic, DynamicLossScaler)
    assert dynamic.dynamic
    for _ in range(arguments["scale_window"] + 1):
        dynamic.update_scale(False)
    assert dynamic.cur_scale == 32.0  # doubled after a window without overflow
    static = deepspeed_compat.create_loss_scaler(torch.float16, 4.0, False, None)
    assert isinstance(static, LossScaler)
    assert (static.cur_scale, static.dynamic) == (4.0, False)
    assert deepspeed_compat.create_loss_scaler(torch.bfloat16, 4.0, True, arguments).cur_scale == 1.0


def test_gradient_hook_sees_the_gradient_survives_being_frozen_and_can_be_removed() -> None:
    param, other, seen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), []
    handle = deepspeed_compat.register_grad_hook(param, lambda *_: seen.append(param.grad.tolist()))
    for trainable in (False, True):
        param.requires_grad_(trainable)
        (2 * param * other).sum().backward()
    assert seen == [[2.0, 2.0]]
    handle.remove()
    (2 * param).sum().backward()
    assert len(seen) == 1


def test_used_parameters_are_counted_within_backward() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(1)) for _ in range(3))
    frozen.requires_grad_(False)
    counts: list[int] = []
    deepspeed_compat.register_grad_hook(
        used, lambda *_: counts.append(deepspeed_compat.count_used_parameters_in_backward([used, unused, frozen]))
    )
    (used * frozen).sum().backward()
    assert counts == [1]


class _Wrapper(deepspeed_compat.ZeROOptimizer):
    """The least that a ZeRO optimizer has to do in its hooks."""

    def __init__(self, params: list[nn.Parameter]):
        super().__init__()
        self.epilogues = 0
        self.register_grad_acc_post_hook(self._end)
        for param in params:
            deepspeed_compat.register_grad_hook(param, lambda *_: self._arrive(params))

    def _end(self) -> None:
        self.epilogues += 1

    def _arrive(self, params: list[nn.Parameter]) -> None:
        refresh = self.should_refresh_expected_hook_count()
        self.reenter_backward_if_needed()
        expected = self._max_expected_hooks_seen
        if refresh:
            expected = deepspeed_compat.count_used_parameters_in_backward(params)
        self.update_hook_state_and_maybe_run_epilogue(expected)


def test_hook_state_ends_every_backward_exactly_once() -> None:
    layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    wrapper = _Wrapper(list(layers.parameters()))
    for step, used in enumerate(([0, 1, 2], [1], [0, 2]), start=1):
        wrapper.clear_backward_seen_flag()
        x = torch.ones(1, 2)
        for index in used:
            x = layers[index](x)
        wrapper.enter_backward()
        x.sum().backward()
        wrapper.exit_backward()
        assert wrapper.epilogues == step
    layers[0](torch.ones(1, 2)).sum().backward()  # which the engine did not start
    assert wrapper.epilogues == 3


# ---- names that need an engine --------------------------------------------------------------------------------------


def calls_of_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """How a stock engine uses the methods that GrassEngine overrides."""
    calls: list[str] = []

    class Recorder(deepspeed_compat.DeepSpeedEngine):
        def _configure_zero_optimizer(self, optimizer: Any) -> Any:
            calls.append(f"configure {type(optimizer).__name__}")
            wrapper = super()._configure_zero_optimizer(optimizer)
            calls.append(f"made {wrapper is not None}")
            self.made = wrapper
            return wrapper

        def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> Any:
            calls.append(f"check {type(basic_optimizer).__name__}")
            wrapper = super()._do_optimizer_sanity_check(basic_optimizer)
            calls.append(f"wrapper {wrapper}")
            return wrapper

        def _take_model_step(self, lr_kwargs: Any) -> None:
            calls.append("step")
            super()._take_model_step(lr_kwargs)

    stock, deepspeed.DeepSpeedEngine = deepspeed.DeepSpeedEngine, Recorder
    try:
        model = tiny_llama()
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    finally:
        deepspeed.DeepSpeedEngine = stock
    built = engine.optimizer is getattr(engine, "made", None)
    for micro in range(4):
        ids = batch(0, micro, engine.global_rank)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        calls.append(f"micro {engine.is_gradient_accumulation_boundary()}")
        engine.step()
    reads = {name: getattr(engine, name) for name in deepspeed_compat.ENGINE_READS}
    reads = {name: value() if callable(value) else value for name, value in reads.items()}
    reads["lacking"] = [name for name in deepspeed_compat.ENGINE_ATTRIBUTES if not hasattr(engine, name)]
    engine.destroy()
    return {"calls": calls, "built": built, "reads": reads, "sequence": deepspeed_compat.sequence_parallel_size()}


@pytest.mark.dist
def test_engine_builds_the_wrapper_through_the_overridden_methods(one_rank: Any) -> None:
    config = ds_config(dtype="bf16", gas=2, clip=0.5, data_types={"grad_accum_dtype": "fp32"})
    [found] = one_rank.run(calls_of_a_run, config=config)
    assert found["calls"][:4] == [
        "check AdamW",
        f"wrapper {deepspeed_compat.ZERO_OPTIMIZATION}",
        "configure AdamW",
        "made True",
    ]
    assert found["calls"][4:] == 2 * ["micro False", "micro True", "step"]  # at the accumulation boundary alone
    assert found["built"]
    assert found["sequence"] == 1


@pytest.mark.dist
def test_engine_answers_what_is_read_of_it(one_rank: Any) -> None:
    config = ds_config(dtype="bf16", clip=0.5, data_types={"grad_accum_dtype": "fp32"}, communication_data_type="fp32")
    config["zero_optimization"]["overlap_comm"] = True
    reads = one_rank.run(calls_of_a_run, config=config)[0]["reads"]
    expected = {
        "aio_config": deepspeed_compat.AIO_DEFAULT_DICT,
        "bfloat16_enabled": True,
        "communication_data_type": torch.float32,
        "dynamic_loss_scale": True,  # the default, also of a run that is not fp16: 0 stands for "dynamic"
        "fp16_enabled": False,
        "get_data_types": (torch.bfloat16, torch.float32),
        "gradient_clipping": 0.5,
        "is_compiled": False,
        "load_universal_checkpoint": False,
        "loss_scale": 0,
        "zero_optimization_stage": 2,
        "zero_overlap_comm": True,
    }
    assert {name: reads[name] for name in expected} == expected
    assert reads["lacking"] == []
    assert set(deepspeed_compat.ENGINE_READS) == {*expected, "dynamic_loss_scale_args"}  # each has its line here


@pytest.mark.dist
def test_stage_1_in_bf16_with_fp32_accumulation_asks_for_another_wrapper(one_rank: Any) -> None:
    """The trap that ``GrassEngine._do_optimizer_sanity_check`` is there for."""
    config = ds_config(dtype="bf16", stage=1, data_types={"grad_accum_dtype": "fp32"})
    [found] = one_rank.run(calls_of_a_run, config=config)
    assert f"wrapper {deepspeed_compat.BFLOAT16}" in found["calls"]
    assert not any(call.startswith("configure") for call in found["calls"])


def kept_names(config: dict[str, Any]) -> set[str]:
    model = tiny_llama()
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    with engine_of(config, model) as engine:
        return set(model.state_dict()) - set(engine.module_state_dict(exclude_frozen_parameters=True))


@pytest.mark.dist
def test_module_state_dict_takes_requires_grad_for_frozen(one_rank: Any) -> None:
    assert one_rank.run(kept_names, config=ds_config()) == [{"model.embed_tokens.weight"}]
