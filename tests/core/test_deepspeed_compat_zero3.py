# SPDX-License-Identifier: Apache-2.0
"""The private names of ZeRO-3 in ``core/deepspeed_compat.py`` do what grass_ds expects, on stock DeepSpeed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed import utils
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from helpers.models import batch, ds_config, tiny_llama
from torch import nn

from grass_ds.core import deepspeed_compat

HERE = deepspeed_compat.ZeroParamStatus.AVAILABLE
ELSEWHERE = deepspeed_compat.ZeroParamStatus.NOT_AVAILABLE
THRESHOLD = 100  # elements: the norms, 32 each, stay gathered


@contextmanager
def hooks_on_weights(**zero: Any) -> Iterator[tuple[Any, Any]]:
    """A stock engine without an optimizer, and what it was before it was cut up."""
    config = ds_config(stage=3, zero_optimization={"stage3_param_persistence_threshold": THRESHOLD, **zero})
    del config["optimizer"]
    model = tiny_llama()
    whole = {name: param.detach().clone() for name, param in model.named_parameters()}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    try:
        yield engine, whole
    finally:
        engine.destroy()


def cut_up_and_put_together() -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    with hooks_on_weights() as (engine, whole):
        hooks = engine.optimizer  # what _configure_zero_optimizer gives without an optimizer
        assert type(hooks) is deepspeed_compat.DeepSpeedZeRoOffload
        assert hooks.module is engine.module
        assert type(hooks.get_param_coordinator()) is PartitionedParameterCoordinator
        params: dict[str, Any] = dict(engine.module.named_parameters())
        small = [param for name, param in params.items() if whole[name].numel() <= THRESHOLD]
        assert {id(p) for p in hooks.persistent_parameters} == {id(p) for p in small} != set()
        for name, param in params.items():
            size = whole[name].numel()
            part = -(-size // world)
            mine = whole[name].flatten()[rank * part : (rank + 1) * part]
            assert (param.ds_shape, param.ds_numel) == (whole[name].shape, size)
            assert param.ds_persist == (size <= THRESHOLD)
            assert (param.ds_status, param.numel(), param.ds_tensor.numel()) == (ELSEWHERE, 0, part)
            assert torch.equal(param.ds_tensor[: mine.numel()], mine)
            param.ds_tensor.data = 2 * param.ds_tensor  # moved elsewhere: gathers read it there
        first, *others = params.values()
        first.all_gather_coalesced(list(params.values())).wait()
        for name, param in params.items():
            assert param.ds_status is HERE
            assert torch.equal(param, 2 * whole[name])
        kept = first.ds_tensor.clone()
        first.data.zero_()
        first.ds_active_sub_modules.add(1)
        with pytest.raises(RuntimeError, match="still active"):
            first.partition()
        first.ds_active_sub_modules.clear()
        first.partition()  # gives up what was gathered; the partition is not written
        assert (first.ds_status, first.numel()) == (ELSEWHERE, 0)
        assert torch.equal(first.ds_tensor, kept)
        hooks.partition_all_parameters()
        assert all(param.ds_status is ELSEWHERE for param in params.values())
        small[0].all_gather_coalesced(small).wait()
        others[0].all_gather_coalesced(others[:1]).wait()
        hooks.empty_partition_cache()
        assert all(param.ds_status is ELSEWHERE for param in params.values())


@pytest.mark.dist
def test_partitions(two_ranks: Any) -> None:
    two_ranks.run(cut_up_and_put_together)


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def gathered_names(model: Any) -> list[str]:
    return [name for name, param in model.named_parameters() if param.ds_status is HERE]


def forward(model: Any) -> torch.Tensor:
    ids = batch(0, 0, dist.get_rank())
    return model(input_ids=ids, labels=ids).loss


def run_through() -> None:
    eager = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    with hooks_on_weights(**eager) as (engine, _):
        model, hooks = engine.module, engine.optimizer
        coordinator = hooks.get_param_coordinator()
        for name, param in model.named_parameters():
            param.requires_grad_(".layers.2." in name)
        weight, ahead = model.model.layers[1].mlp.down_proj.weight, []
        model.model.layers[1].mlp.act_fn.register_forward_hook(
            lambda *_: ahead.append(weight.ds_status is not ELSEWHERE)
        )
        assert coordinator.is_invalid_trace()
        lists = "_PartitionedParameterCoordinator__submodule_order"
        before = getattr(coordinator, lists)
        assert getattr(deepspeed_compat.without_trace(coordinator), lists) is not before
        coordinator._clear_trace_structures()  # makes new lists, the old ones stay as they are
        assert getattr(coordinator, lists) is not before
        forward(model).backward()
        assert not coordinator.is_invalid_trace()
        assert not coordinator.is_complete_trace()
        lowest = "model.layers.2.input_layernorm.weight"  # its input needs no gradient: nothing told that backward is through
        assert gathered_names(model) == [lowest]
        hooks.release_backward_leftovers()
        assert gathered_names(model) == []
        forward(model).backward()
        hooks.release_backward_leftovers()
        assert coordinator.is_complete_trace()  # recorded, and from now on weights come ahead
        forward(model).backward()
        assert ahead == [False, True, True]
        hooks.release_backward_leftovers()
        hooks.param_coordinator = other = deepspeed_compat.without_trace(coordinator)
        assert other.is_invalid_trace() and coordinator.is_complete_trace()
        for _ in range(2):
            forward(model).backward()
            hooks.release_backward_leftovers()
        hooks.param_coordinator = coordinator
        forward(model).backward()
        hooks.release_backward_leftovers()
        assert other.is_complete_trace() and coordinator.is_complete_trace()
        assert ahead == [False, True, True, False, True, True]
        coordinator._invalidate_trace()
        assert coordinator.is_invalid_trace()
        with pytest.raises(RuntimeError, match="already invalid"):
            coordinator._invalidate_trace()
        forward(model).backward()  # starts over
        assert not coordinator.is_invalid_trace()
        hooks.partition_all_parameters()


@pytest.mark.dist
def test_gathering_and_its_trace(two_ranks: Any) -> None:
    two_ranks.run(run_through)


def come_and_go() -> None:
    with hooks_on_weights() as (engine, _):
        model, hooks = engine.module, engine.optimizer
        stream = hooks._DeepSpeedZeRoOffload__allgather_stream
        assert (stream is None) == get_accelerator().is_synchronized_device()
        forward(model).backward()
        before = hooks_of(model)
        modules = list(model.modules())
        assert all(name in vars(module) for module in modules for name in ("pre_bwd_fn", "post_bwd_fn"))
        deepspeed_compat.remove_zero3_hooks(hooks)
        assert not any(name in vars(module) for module in modules for name in deepspeed_compat.LEFT_ON_MODULES)
        assert before - hooks_of(model) > 3 * len(modules)
        assert hooks_of(model) <= 2  # the engine's own
        hooks._register_deepspeed_module(model)  # and back: with functions of its own for every module
        assert all(name in vars(module) for module in modules for name in deepspeed_compat.LEFT_ON_MODULES)


@pytest.mark.dist
def test_hooks_come_and_go(two_ranks: Any) -> None:
    two_ranks.run(come_and_go)


def test_release_decisions_are_cached_until_cleared() -> None:
    decide = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    coordinator, module = mock.MagicMock(), nn.Linear(2, 2, bias=False)
    coordinator._PartitionedParameterCoordinator__most_recent_step_id_param_fetched_for.__getitem__.return_value = -1
    module.weight.ds_id, module.weight.ds_persist, module.weight.ds_numel = 5, False, 4  # type: ignore[attr-defined]
    module.ds_external_parameters = tuple  # type: ignore[assignment]
    assert decide(coordinator, module, 0) == {5}
    module.weight.ds_persist = True  # type: ignore[attr-defined]
    assert decide(coordinator, module, 0) == {5}
    deepspeed_compat.clear_release_cache()
    assert decide(coordinator, module, 0) == set()


def test_safe_functions_ask_the_object_on_the_parameter() -> None:
    param, value, key = nn.Parameter(torch.zeros(2)), torch.ones(2), "exp_avg"
    param.ds_id = 0  # type: ignore[attr-defined]
    asked = param._z3_optimizer = mock.Mock()  # type: ignore[attr-defined]
    calls = [
        (utils.safe_get_full_fp32_param(param), mock.call.get_full_hp_param(param)),
        (utils.safe_get_full_optimizer_state(param, key), mock.call.get_full_hp_param(param, key)),
        (utils.safe_get_full_grad(param), mock.call.get_fp32_grad_for_param(param)),
        (utils.safe_get_local_fp32_param(param), mock.call.get_local_fp32_param(param)),
        (utils.safe_get_local_optimizer_state(param, key), mock.call.get_local_fp32_param(param, key)),
        (utils.safe_get_local_grad(param), mock.call.get_local_fp32_grad_for_param(param)),
        (utils.safe_set_full_fp32_param(param, value), mock.call.set_full_hp_param(value, param)),
        (utils.safe_set_full_optimizer_state(param, value, key), mock.call.set_full_hp_param(value, param, key)),
        (utils.safe_set_full_grad(param, value), mock.call.set_fp32_grad_for_param(value, param)),
        (utils.safe_set_local_fp32_param(param, value), mock.call.set_local_hp_param(value, param)),
        (utils.safe_set_local_optimizer_state(param, value, key), mock.call.set_local_hp_param(value, param, key)),
        (utils.safe_set_local_grad(param, value), mock.call.set_local_grad_for_param(value, param)),
        (
            utils.safe_update_full_grad_vectorized([param], len),
            mock.call.update_fp32_grad_for_param_vectorized(len, [param]),
        ),
    ]
    assert asked.mock_calls == [call for _, call in calls]


def kept_names() -> set[str]:
    config = ds_config(stage=3, zero_optimization={"stage3_gather_16bit_weights_on_model_save": True})
    model = tiny_llama()
    names = set(model.state_dict())
    model.get_parameter("model.embed_tokens.weight").requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))
    try:
        return names - set(engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True))
    finally:
        engine.destroy()


@pytest.mark.dist
def test_consolidated_weights_take_requires_grad_for_frozen(one_rank: Any) -> None:
    assert one_rank.run(kept_names) == [{"model.embed_tokens.weight"}]
