# SPDX-License-Identifier: Apache-2.0
"""ZeRO-3 with models built under zero.Init, from a folder, or whole; and settings that must not change a bit."""

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from helpers.live import LiveBytes, hooks_on
from helpers.models import (
    ds_config,
    engine_of,
    gathered,
    grass_block,
    snapshot,
    split_groups,
    tiny_llama,
    train,
)
from helpers.observed import difference, observe
from helpers.same_arithmetic import same_arithmetic
from helpers.tiered import tiered
from torch import nn

from grass_ds.core import deepspeed_compat

pytestmark = pytest.mark.dist

STEPS = 8  # 2 probing, a switch every 3
MIDDLE, HUGE = 100, 10**9  # the norms stay gathered, everything does


def zero3(dtype: str = "fp32", **zero: Any) -> dict[str, Any]:
    return ds_config(stage=3, dtype=dtype, clip=0.5, lr=1e-2, zero_optimization=zero, grass=grass_block())


def run(config: dict[str, Any], model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """A run, and what it came to."""
    with engine_of(copy.deepcopy(config), model, **arguments) as engine:
        losses = train(engine, STEPS)
        return {"losses": losses, **observe(engine)}


def copy_of(weights: dict[str, torch.Tensor]) -> nn.Module:
    """A plain model with these weights."""
    model = tiny_llama(seed=3).to(next(iter(weights.values())).dtype)
    model.load_state_dict(weights)
    return model


# ---- ways to build --------------------------------------------------------------------------------------------------


def under_init(config: dict[str, Any], folder: Path) -> nn.Module:
    import transformers.models.llama.modeling_llama  # noqa: F401, while torch still makes plain tensors

    dtype = torch.bfloat16 if "bf16" in config else torch.float32
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config), dtype=dtype):
        return tiny_llama()


def from_folder(config: dict[str, Any], folder: Path) -> nn.Module:
    """As the HF Trainer has it: from_pretrained() while an HfDeepSpeedConfig is alive."""
    from deepspeed import comm as dist
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if dist.get_rank() == 0:
        tiny_llama(seed=5).save_pretrained(folder)
    dist.barrier()
    alive = HfDeepSpeedConfig(copy.deepcopy(config))
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16" if "bf16" in config else "float32")
    finally:
        unset_hf_deepspeed_config()
        del alive
    for buffer in model.buffers():
        buffer.data = buffer.data.to(model.dtype)  # DeepSpeed does so for models that come whole
    with gathered(model.parameters()):
        saved = tiny_llama(seed=5).to(model.dtype).state_dict()
        assert difference(saved, {name: tensor.clone() for name, tensor in model.state_dict().items()}) is None
    return model


def both_orders(config: dict[str, Any], build: Any, folder: Path) -> tuple[str | None, int]:
    """How a run of the partitioned model differs from one of the whole model; parameters that were built whole."""
    model = build(config, folder)
    whole = sum(
        getattr(param, "ds_status", None) is not deepspeed_compat.ZeroParamStatus.NOT_AVAILABLE
        for param in model.parameters()
    )
    weights = snapshot(model)
    first = run(config, model)
    assert any(not torch.equal(first["weights"][name], weight) for name, weight in weights.items())
    return difference(first, run(config, copy_of(weights))), whole


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [under_init, from_folder], ids=lambda build: build.__name__)
def test_a_model_built_in_parts_trains_as_one_built_whole(
    two_ranks: Any, build: Any, dtype: str, tmp_path: Path
) -> None:
    config = zero3(dtype, stage3_param_persistence_threshold=0)
    assert two_ranks.run(both_orders, config=config, build=build, folder=tmp_path) == [(None, 0)] * 2


def most_alive(config: dict[str, Any], in_parts: bool) -> tuple[int, int, int]:
    """Bytes: the most alive until the engine is there; the model's; its largest parameter's."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    with LiveBytes() as live:
        if in_parts:
            with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config)):
                model = tiny_llama(layers=12)
        else:
            model = tiny_llama(layers=12)
        with engine_of(config, model):
            peak = live.peak
    sizes = [param.ds_numel * 4 for param in model.parameters()]
    return peak, sum(sizes), max(sizes)


@pytest.mark.parametrize("pool", ["two_ranks", "four_ranks"])
def test_the_model_is_never_whole_on_one_rank(request: pytest.FixtureRequest, pool: str) -> None:
    ranks = request.getfixturevalue(pool)
    config = zero3(stage3_param_persistence_threshold=0)
    for peak, model, largest in ranks.run(most_alive, config=config, in_parts=True):
        # all partitions, one more of a layer that moves into its unit's buffer, and a few parameters on their way into parts
        assert peak < model / ranks.world + model / 12 + 4 * largest < 0.8 * model
    for peak, model, _ in ranks.run(most_alive, config=config, in_parts=False):
        assert peak >= model  # the measure sees it


# ---- settings that change where weights are, not what they become ---------------------------------------------------

QUIET: dict[str, dict[str, Any]] = {
    "nothing persistent": {"stage3_param_persistence_threshold": 0},
    "norms persistent": {"stage3_param_persistence_threshold": MIDDLE},
    "all persistent": {"stage3_param_persistence_threshold": HUGE},
    "nothing kept, nothing ahead": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0},
    "gathered by all-reduce": {"stage3_use_all_reduce_for_fetch_params": True},
    "weights on the host": {"offload_param": {"device": "cpu"}},
    "weights on the host, pageable": {"offload_param": {"device": "cpu", "pin_memory": False}},
    "host and persistent": {"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": MIDDLE},
}


def all_settings(settings: list[dict[str, Any]], dtype: str) -> list[str | None]:
    model = tiny_llama(seed=2).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    reference = run(zero3(dtype), model)
    return [difference(reference, run(zero3(dtype, **setting), copy_of(weights))) for setting in settings]


@pytest.mark.parametrize("dtype", tiered(["fp32", "bf16"], "bf16"))
def test_settings_that_change_no_bit(two_ranks: Any, dtype: str) -> None:
    for found in two_ranks.run(all_settings, settings=list(QUIET.values()), dtype=dtype):
        assert dict(zip(QUIET, found, strict=True)) == dict.fromkeys(QUIET)


def where_weights_rest(pinned: bool, threshold: int) -> dict[str, Any]:
    """Pretend that tensors can be pinned. Which shards are, and how many parameters are persistent."""
    marked: set[int] = set()

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        copied = tensor.clone()
        marked.add(copied.untyped_storage().data_ptr())
        return copied

    accelerator = get_accelerator()
    place = {"device": "cpu", "pin_memory": pinned}
    with (
        mock.patch.object(accelerator, "pin_memory", pin),
        mock.patch.object(accelerator, "is_pinned", lambda t: t.untyped_storage().data_ptr() in marked),
        engine_of(zero3(offload_param=place, stage3_param_persistence_threshold=threshold)) as engine,
    ):
        train(engine, 4)
        return {
            "shards": [unit.shard.untyped_storage().data_ptr() in marked for unit in engine.optimizer.units],
            "shared": all(
                param.ds_tensor.untyped_storage().data_ptr() == unit.shard.untyped_storage().data_ptr()
                for unit in engine.optimizer.units
                for param in unit.params
            ),
            "persistent": sum(param.ds_persist for param in engine.module.parameters()),
        }


@pytest.mark.parametrize(("pinned", "threshold", "persistent"), [(True, 0, 0), (False, 0, 0), (True, MIDDLE, 9)])
def test_host_shards_are_pinned_when_asked(two_ranks: Any, pinned: bool, threshold: int, persistent: int) -> None:
    for found in two_ranks.run(where_weights_rest, pinned=pinned, threshold=threshold):
        assert found["shared"]
        assert found["persistent"] == persistent
        assert set(found["shards"]) == {pinned}


def leaves(granularity: int, whole_layers: bool) -> str | None:
    """Modules whose weights come and go together; difference to a run without."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

    weights = snapshot(tiny_llama(seed=2))
    with same_arithmetic():
        reference, model = run(zero3(), copy_of(weights)), copy_of(weights)
        if not granularity:
            deepspeed.utils.set_z3_leaf_modules(model, [LlamaDecoderLayer if whole_layers else LlamaMLP])
        found = run(zero3(stage3_module_granularity_threshold=granularity), model)
    return difference(found, reference)


@pytest.mark.parametrize(("granularity", "whole_layers"), [(0, False), (0, True), (3000, True)])
def test_leaf_modules(two_ranks: Any, granularity: int, whole_layers: bool) -> None:
    assert two_ranks.run(leaves, granularity=granularity, whole_layers=whole_layers) == [None] * 2


# ---- which parameters, by which optimizer ---------------------------------------------------------------------------

FROZEN = ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight")


def variants(in_parts: bool) -> dict[str, Any]:
    """Frozen parameters, two groups, a client optimizer: how each run differs from ZeRO-2, and what it trained."""
    config = zero3()
    config["gradient_clipping"] = 0.0  # the norm is a sum over other shards
    made = under_init(config, Path()) if in_parts else tiny_llama(seed=2)
    weights = snapshot(made)

    def pair(prepare: Any) -> dict[str, Any]:
        model = made if in_parts and prepare is client else copy_of(weights)
        ends = []
        for stage, candidate in ((3, model), (2, copy_of(weights))):
            settings = copy.deepcopy(config)
            settings["zero_optimization"] = {"stage": stage}
            arguments = prepare(candidate)
            if "optimizer" in arguments:
                del settings["optimizer"]
            with same_arithmetic(), engine_of(settings, candidate, **arguments) as engine:
                train(engine, STEPS)
                ends.append(
                    {
                        "weights": snapshot(candidate),
                        "visits": engine.grass.visits,
                        "units": len(engine.optimizer.units),
                    }
                )
            ends[-1]["frozen"] = [name for name, param in candidate.named_parameters() if not param.requires_grad]
        three, two = ends
        moved = {name for name, weight in three["weights"].items() if not torch.equal(weight, weights[name])}
        return {
            "different": difference(three, two),
            "moved": moved,
            **{key: three[key] for key in ("units", "frozen")},
        }

    def frozen(model: nn.Module) -> dict[str, Any]:
        for name in FROZEN:
            model.get_parameter(name).requires_grad_(False)
        return {}

    def groups(model: nn.Module) -> dict[str, Any]:
        return (
            {"model_parameters": split_groups(model)}
            if not in_parts
            else {"model_parameters": list(model.parameters())}
        )

    def client(model: nn.Module) -> dict[str, Any]:
        return {"optimizer": torch.optim.AdamW(list(model.parameters()), lr=1e-2, weight_decay=0.1)}

    return {prepare.__name__: pair(prepare) for prepare in (frozen, groups, client)}


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "in parts"])
def test_frozen_parameters_groups_and_client_optimizers(two_ranks: Any, in_parts: bool) -> None:
    for found in two_ranks.run(variants, in_parts=in_parts):
        for name, pair in found.items():
            assert pair["different"] is None, name
            assert pair["moved"], name
        assert found["frozen"]["frozen"] == sorted(FROZEN)
        assert not found["frozen"]["moved"] & set(FROZEN)
        assert in_parts or found["groups"]["units"] > found["client"]["units"]


def built_for_others(config: dict[str, Any]) -> tuple[str, int]:
    """Every rank has partitioned the model for itself alone."""
    from deepspeed import comm as dist

    mine = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with deepspeed.zero.Init(config_dict_or_path=copy.deepcopy(config), data_parallel_group=mine):
        model = tiny_llama()
    try:
        with engine_of(config, model):
            return "", 0
    except RuntimeError as error:
        return str(error), hooks_on(model)


def test_partitions_over_other_ranks_are_refused(two_ranks: Any) -> None:
    for message, left in two_ranks.run(built_for_others, config=zero3()):
        assert "its weights are not partitioned over the 2 data-parallel ranks" in message
        assert left == 0
