# SPDX-License-Identifier: Apache-2.0
"""Mistakes are refused before there is a process group, with key, value and remedy, alike on every rank."""

import copy
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from helpers.models import LAYERS, ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import grass_ds
from grass_ds import validation
from grass_ds.config import GrassConfig, GrassConfigError


@pytest.fixture(autouse=True)
def no_process_group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever gets past the checks fails here rather than in the middle of DeepSpeed."""
    if request.node.get_closest_marker("dist"):
        return

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a process group was about to be made")

    monkeypatch.setattr("deepspeed.comm.init_distributed", refuse)


def refusal(config: dict[str, Any], model: nn.Module | None = None, **arguments: Any) -> str:
    """The error of grass_ds.initialize, which deepspeed.initialize must give alike once enabled."""
    model = nn.Linear(2, 2) if model is None else model
    messages = []
    with grass_ds.enable():
        for initialize in (grass_ds.initialize, deepspeed.initialize):
            with pytest.raises(GrassConfigError) as caught:
                initialize(model=model, config=copy.deepcopy(config), **arguments)
            messages.append(str(caught.value))
    assert messages[0] == messages[1]
    return messages[0]


# ---- the DeepSpeed config -------------------------------------------------------------------------------------------


def with_value(path: str, value: Any, stage: int = 2) -> dict[str, Any]:
    config = ds_config(stage=stage, grass=grass_block())
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section.setdefault(parent, {})
    section[key] = value
    return config


def test_a_bad_block_is_refused_before_deepspeed_starts() -> None:
    message = refusal(ds_config(grass={"num_active_layers": 0, "sample_perid": 5}))
    assert "grass.num_active_layers: got 0" in message
    assert "Did you mean 'sample_period'?" in message


def test_a_block_inside_zero_optimization_gets_our_message() -> None:
    config = ds_config()
    config["zero_optimization"]["grass"] = {"sampler": "uniform"}
    assert '"zero_optimization.grass"' in (message := refusal(config))
    assert "top level" in message
    assert "Extra inputs" not in message  # pydantic's words for it


@pytest.mark.parametrize("section", [*({"stage": stage} for stage in (0, None, 4, "two")), {}, True, None])
def test_other_zero_stages(section: Any) -> None:
    message = refusal({**ds_config(grass=grass_block()), "zero_optimization": section})
    assert "ZeRO stage 1 or 2 or 3" in message
    assert f"zero_optimization.stage = {section.get('stage') if isinstance(section, dict) else None!r}" in message


REFUSED = {
    "zero_optimization.offload_optimizer.device": "cpu",
    "zero_optimization.offload_optimizer.super_offload": True,
    "zero_optimization.cpu_offload": True,
    "zero_optimization.cpu_offload_param": True,
    "zero_optimization.zero_hpz_partition_size": 2,
    "zero_optimization.mics_shard_size": 2,
    "zero_optimization.zenflow": {"topk_ratio": 0.1},
    "zero_optimization.elastic_checkpoint": True,
    "zero_optimization.zero_quantized_weights": True,
    "zero_optimization.zero_quantized_gradients": True,
    "zero_optimization.zero_quantized_nontrainable_weights": True,
    "zero_optimization.compute_grad_norm": False,
    "bf16.bf16_master_weights_and_grads": True,
    "fp16.fp16_master_weights_and_grads": True,
    "torch_autocast.enabled": True,
    "prescale_gradients": True,
    "gradient_predivide_factor": 2.0,
    "sparse_gradients": True,
    "compile.deepcompile": True,
    "hybrid_engine.enabled": True,
    "elasticity.enabled": True,
    "tensor_parallel.autotp_size": 2,
    "expert_parallel.enabled": True,
    "checkpoint.async": "yes",
    "checkpoint.writer": {"type": "FAST"},
    "checkpoint.use_node_local_storage": True,
    "datastates_ckpt": {"host_cache_size": 1},
}


@pytest.mark.parametrize("stage", [2, 3])
def test_every_refused_setting_is_named_with_value_and_remedy(stage: int) -> None:
    assert REFUSED.keys() == validation.REFUSED_SETTINGS.keys()
    for path, value in REFUSED.items():
        message = refusal(with_value(path, value, stage))
        assert f"{path} = {value!r}: {validation.REFUSED_SETTINGS[path][0]}" in message
        assert message.count("\n") == 1  # nothing else is wrong with these configs


@pytest.mark.parametrize(("stage", "device"), [(1, "cpu"), (2, "cpu"), (2, "nvme"), (3, "nvme")])
def test_weights_that_cannot_rest_there(stage: int, device: str) -> None:
    config = with_value("zero_optimization.offload_param", {"device": device, "nvme_path": "/missing"}, stage)
    message = refusal(config)
    assert f"zero_optimization.offload_param.device = {device!r}: weights stay on the device on ZeRO-1/2" in message
    assert message.count("\n") == 1


HARMLESS = {
    "zero_optimization.offload_param": {"device": "cpu"},
    "zero_optimization.offload_optimizer": {"device": "none"},
    "zero_optimization.zero_hpz_partition_size": 1,
    "zero_optimization.mics_shard_size": -1,
    "zero_optimization.zero_quantized_weights": False,
}


def test_values_that_ask_for_nothing_are_no_mistake() -> None:
    for path, value in HARMLESS.items():
        validation.check_ds_config(with_value(path, value, stage=3), GrassConfig())
    validation.check_ds_config(ds_config(aio={"block_size": 1000}), GrassConfig())  # without offload to NVMe


def test_all_refused_settings_are_listed_at_once() -> None:
    config = with_value("zero_optimization.stage", 4)
    config["sparse_gradients"] = True
    config["optimizer"]["type"] = "Muon"
    message = refusal(config)
    assert all(word in message for word in ("zero_optimization.stage", "sparse_gradients", "optimizer.type"))


AIO_MISTAKES = [
    ("block_size", 1000, "a multiple of 4096"),
    ("block_size", "1M", "an integer from 4096"),
    ("queue_depth", 0, "an integer from 1"),
    ("intra_op_parallelism", True, "an integer from 1"),
    ("use_gds", True, "set it to false"),
]


@pytest.mark.parametrize(("key", "value", "remedy"), AIO_MISTAKES)
def test_an_aio_block_that_would_not_work(key: str, value: Any, remedy: str) -> None:
    offload = {"device": "nvme", "nvme_path": "/missing"}
    message = refusal(ds_config(grass=grass_block(offload=offload), aio={key: value}))
    assert f"aio.{key}" in message and str(value).lower() in message.lower() and remedy in message
    assert "/missing" not in message  # nothing else was looked at


@pytest.mark.parametrize(
    ("kind", "stage"), [("Muon", 3), *((k, 2) for k in ("Muon", "Lamb", "OneBitAdam", "OneBitLamb", "ZeroOneAdam"))]
)
def test_optimizers_that_need_whole_matrices(kind: str, stage: int) -> None:
    message = refusal(with_value("optimizer.type", kind, stage))
    assert f"optimizer.type = {kind.lower()!r}" in message
    assert "use AdamW" in message


def test_a_client_optimizer_that_needs_whole_matrices() -> None:
    model = nn.Linear(2, 2)
    muon = type("Muon", (torch.optim.SGD,), {})(model.parameters(), lr=0.1)
    message = refusal(ds_config(stage=3, grass=grass_block()), model, optimizer=muon)
    assert "the optimizer Muon needs whole matrices" in message and "use torch.optim.AdamW" in message


def test_every_way_to_hand_over_the_config_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(ds_config(grass={"seed": -1})))
    model = nn.Linear(2, 2)
    ways: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((), {"model": model, "config": str(path)}),
        ((), {"model": model, "config_params": str(path)}),
        ((), {"model": model, "args": SimpleNamespace(deepspeed_config=str(path))}),
        ((), {"model": model, "args": SimpleNamespace(deepspeed_config=None, deepscale_config=str(path))}),
        ((SimpleNamespace(deepspeed_config=str(path)), model), {}),
    ]
    for positional, named in ways:
        with pytest.raises(GrassConfigError, match=r"grass\.seed: got -1"):
            grass_ds.initialize(*positional, **named)


def test_a_missing_config_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json"):
        grass_ds.initialize(model=nn.Linear(2, 2), config=str(tmp_path / "nowhere.json"))


# ---- the model ------------------------------------------------------------------------------------------------------


def lora(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))  # type: ignore[arg-type]


def added_adapter(model: Any) -> nn.Module:
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    return model


def without_lora(model: nn.Module) -> Any:
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    return get_peft_model(model, config)  # type: ignore[arg-type]


def wrapped_lora(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"module": lora(model)})


def lora_unwrapped(model: nn.Module) -> Any:
    return lora(model).base_model.model


@pytest.mark.parametrize("wrap", [lora, added_adapter, without_lora, wrapped_lora, lora_unwrapped])
def test_peft_models(wrap: Any) -> None:
    message = refusal(ds_config(grass=grass_block()), wrap(tiny_llama()))
    assert all(words in message for words in ("PEFT", "merge_and_unload()", 'sampler": "ist', "without the block"))


def test_moe_experts() -> None:
    model = tiny_llama()
    for param in model.model.layers[1].mlp.parameters():  # type: ignore[union-attr]
        param.allreduce = False  # DeepSpeed's mark of an expert's parameter
    assert "MoE" in refusal(ds_config(grass=grass_block()), model)


@pytest.mark.parametrize("derived", [False, True], ids=["PipelineModule", "a subclass"])
def test_pipeline_modules(derived: bool) -> None:
    """Their engine is another one, so the block would be ignored; as are subclasses, which is how they are written."""
    base = deepspeed.PipelineModule
    cls = type("GPTPipe", (base,), {}) if derived else base
    model = cls.__new__(cls)  # its constructor needs ranks
    nn.Module.__init__(model)
    assert "pipeline" in refusal(ds_config(grass=grass_block()), model)


def test_a_wrong_layers_path_lists_the_candidates() -> None:
    block = grass_block(layers_path="model.layer")
    with pytest.raises(ValueError, match=r"(?s)model\.layer.*Candidates:.*model\.layers: 4 blocks"):
        grass_ds.initialize(model=tiny_llama(), config=ds_config(grass=block))


def test_an_expansion_below_no_layer_is_refused() -> None:
    block = grass_block(expansion=0.1, expansion_depth=4)
    with pytest.raises(ValueError, match=r"grass\.expansion_depth = 4: the model has layers 0 to 3; name one of them"):
        grass_ds.initialize(model=tiny_llama(), config=ds_config(grass=block))


# ---- what is not a mistake, and does as documented ------------------------------------------------------------------


def runs_as_full(config: dict[str, Any], layers: int) -> dict[str, Any]:
    model = tiny_llama(layers)
    before = snapshot(model)
    with engine_of(config, model) as engine:
        seen = [(engine.grass.phase, engine.grass.active_layers)]
        train(engine, 4, after_step=lambda _: seen.append((engine.grass.phase, engine.grass.active_layers)))
        moved = {name for name, weight in snapshot(model).items() if not torch.equal(weight, before[name])}
        return {
            "seen": seen,
            "visits": engine.grass.visits,
            "probabilities": engine.grass.probabilities,
            "moved": moved,
        }


@pytest.mark.dist
@pytest.mark.parametrize(
    ("layers", "gamma", "sampler"), [(1, 1, "grass"), (LAYERS, LAYERS, "cyclic"), (LAYERS, 100, "grass")]
)
def test_as_many_active_layers_as_there_are_trains_them_all(
    two_ranks: Any, layers: int, gamma: int, sampler: str
) -> None:
    """No probing, nothing drawn; outside the blocks still only what always_active names."""
    config = ds_config(grass=grass_block(sampler=sampler, num_active_layers=gamma))
    for report in two_ranks.run(runs_as_full, config=config, layers=layers):
        assert set(report["seen"]) == {("train", tuple(range(layers)))}
        assert report["visits"] == (4,) * layers
        assert sum(report["probabilities"]) == pytest.approx(1)
        assert {name for name in report["moved"] if ".layers." not in name} == {"model.norm.weight"}
        assert len({name.split(".")[2] for name in report["moved"] if ".layers." in name}) == layers


# ---- on every rank --------------------------------------------------------------------------------------------------

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "block": (ds_config(grass={"num_active_layers": 0}), "GrassConfigError: (?s:.*)grass.num_active_layers: got 0"),
    "stage": (ds_config(stage=0, grass=grass_block()), "zero_optimization.stage = 0"),
    "quantised": (
        ds_config(zero_optimization={"stage": 3, "zero_quantized_weights": True}, grass=grass_block()),
        "zero_optimization.zero_quantized_weights = True",
    ),
    "one rank's seed": (ds_config(grass=grass_block()), "^RankDivergenceError"),
}


def errors_of_this_rank() -> dict[str, str]:
    """What each of the mistakes ends in."""
    from deepspeed import comm

    errors = {}
    for name, (config, _) in MISTAKES.items():
        if "seed" in name:
            config = ds_config(grass=grass_block(seed=comm.get_rank()))
        model = tiny_llama()
        try:
            grass_ds.initialize(model=model, config=config, model_parameters=list(model.parameters()))
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
        comm.barrier()  # a rank that went on would hang here
    return errors


@pytest.mark.dist
def test_an_error_is_raised_on_every_rank(two_ranks: Any) -> None:
    for errors in two_ranks.run(errors_of_this_rank):
        assert set(errors) == set(MISTAKES)
        for name, (_, pattern) in MISTAKES.items():
            assert re.search(pattern, errors[name]), (name, errors[name])
