# SPDX-License-Identifier: Apache-2.0
"""Universal checkpoints: DeepSpeed's converter, then a run with another number of ranks goes on, bit for bit."""

import argparse
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LAYERS, ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.observed import difference, optimizer_state
from helpers.tiered import tiered

from grass_ds.checkpoint.expand import expand
from grass_ds.checkpoint.folder import corrupt, problems

pytestmark = pytest.mark.dist

STEPS, SAVED_AFTER, ON_ONE = 12, 7, 2  # probed twice, drawn every third step: saved within the second period
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 4, "total_num_steps": 20, "warmup_max_lr": 1e-2}}
FROZEN = ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.bias")
MOMENTS = ("exp_avg", "exp_avg_sq")

# name -> (ds_config arguments, grass settings); no scores are refreshed after the load, since other ranks measure
# other gradients
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grass-bf16-zero1-host": (
        {"dtype": "bf16", "stage": 1, "clip": 0.5},
        {"sampler": "grass", "num_active_layers": 2, "refresh_period": 60},
    ),
    "uniform-fp32-zero2-device": (
        {"stage": 2, "gas": 2},
        {"sampler": "uniform", "offload": {"device": "none"}, "always_active": ["norm"]},
    ),
    "cyclic-bf16-zero3-nvme": (
        {"dtype": "bf16", "stage": 3},
        {"sampler": "cyclic", "offload": {"device": "nvme", "io": "posix"}},
    ),
    "uniform-bf16-zero2-moments-in-bf16": (
        {"dtype": "bf16", "stage": 2},
        {"sampler": "uniform", "offload": {"state_format": "bf16"}},
    ),
    "cyclic-bf16-zero3-exact": (
        {"dtype": "bf16", "stage": 3},
        {"sampler": "cyclic", "offload": {"state_format": "exact"}},
    ),
}


def model_of(seed: int) -> Any:
    """With uneven shards and partitions, weights that the user froze, and a buffer that is saved."""
    model = tiny_llama(seed=seed, bias=True)
    for name in FROZEN:
        model.get_parameter(name).requires_grad_(False)
    model.register_buffer("seen", torch.full((3,), 10 + seed))
    return model


def whole(engine: Any) -> dict[str, Any]:
    """Everything that makes up a run at one step, whatever the number of ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    params = {name: param for name, param in engine.module.named_parameters() if name not in FROZEN}
    grass, optimizer = engine.grass, engine.optimizer
    return {
        "weights": {**snapshot(engine.module), "seen": engine.module.seen.clone()},
        "masters": {name: safe_get_full_fp32_param(param).clone() for name, param in params.items()},
        "moments": {(n, k): safe_get_full_optimizer_state(p, k).clone() for n, p in params.items() for k in MOMENTS},
        "scalars": copy.deepcopy(
            {u.name: optimizer.store[u].scalars for u in optimizer.units if u in optimizer.store}
        ),
        "sampler": (grass.phase, grass.active_layers, grass.scores, grass.probabilities, grass.visits),
        "fingerprint": optimizer.controller.fingerprint(),
        "hyper": copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]),
        "loss_scale": optimizer.loss_scale,
        "steps": (engine.global_steps, engine.skipped_steps),
    }


def straight(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = {"active": []}

    def after_step(step: int) -> None:
        report["active"].append(engine.grass.active_layers)
        if step + 1 == SAVED_AFTER:
            engine.save_checkpoint(folder, tag="two")
            report["saved"] = whole(engine)
            report["units"] = {unit.name: (unit.layer, unit.param_names) for unit in engine.optimizer.units}

    with engine_of(config, model_of(seed=0)) as engine:
        train(engine, STEPS, after_step=after_step)
    return report


def go_on(config: dict[str, Any], folder: Path, tag: str, steps: int, save_as: str | None = None) -> dict[str, Any]:
    """Load into other weights and another seed, and train on."""
    config["grass"]["seed"], config["checkpoint"] = 1234, {"load_universal": True}
    active: list[Any] = []
    with engine_of(config, model_of(seed=9)) as engine:
        engine.load_checkpoint(folder, tag=tag)
        loaded = whole(engine)
        train(engine, steps, engine.global_steps, after_step=lambda _: active.append(engine.grass.active_layers))
        report = {
            "loaded": loaded,
            "active": active,
            "trained": difference(loaded["weights"], whole(engine)["weights"]),
        }
        if save_as is not None:
            engine.save_checkpoint(folder, tag=save_as)
            report["saved"] = whole(engine)
    return report


def convert(folder: Path, tag: str, inject: bool = False, compact: bool = False) -> Path:
    from deepspeed.checkpoint import ds_to_universal

    source = folder / tag
    if compact:
        source = folder / f"{tag}_in_fp32"
        assert expand(folder / tag, source) == len(list(source.glob("*optim_states.pt")))
        assert not problems(source) and not corrupt(source)
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    options = {"keep_temp_folder": False, "strict": True, "inject_missing_state": inject}
    target = folder / f"{tag}_universal"
    ds_to_universal.main(argparse.Namespace(input_folder=source, output_folder=target, **workers, **options))
    return target


def tensor_in(path: Path) -> torch.Tensor:
    content = torch.load(path)
    return (content["param"] if isinstance(content, dict) else content).reshape(-1)


@pytest.mark.parametrize(
    "case", tiered(CASES, "grass-bf16-zero1-host", "cyclic-bf16-zero3-nvme", "uniform-bf16-zero2-moments-in-bf16")
)
def test_two_ranks_then_one_then_four(
    two_ranks: Any, one_rank: Any, four_ranks: Any, case: str, tmp_path: Path
) -> None:
    settings, sampler = CASES[case]
    config = ds_config(**settings, scheduler=SCHEDULER, grass=grass_block(**sampler))
    if "nvme" in case:
        config["grass"]["offload"]["nvme_path"] = str(tmp_path / "state")
        (tmp_path / "state").mkdir()
    [run, _] = two_ranks.run(straight, config=config, folder=tmp_path)
    stepped = run["saved"]["scalars"].keys()
    idle = {name: params for name, (layer, params) in run["units"].items() if name not in stepped}
    assert len({run["units"][name][0] for name in stepped} - {None}) > 1  # states of layers that are not active
    assert sum(name.startswith("model.layers.") for name in idle) >= 1

    compact = "state_format" in config["grass"].get("offload", {})
    files = convert(tmp_path, "two", compact=compact) / "zero"
    for name, param in run["saved"]["masters"].items():
        assert torch.equal(tensor_in(files / name / "fp32.pt"), param.reshape(-1)), name
    for (name, key), moment in run["saved"]["moments"].items():
        assert torch.equal(tensor_in(files / name / f"{key}.pt"), moment.reshape(-1)), name
        assert bool(moment.any()) != any(name in params for params in idle.values())
    one_path = tmp_path / "two_universal"
    assert (tmp_path / "latest_universal").read_text() == one_path.name

    [alone] = one_rank.run(go_on, config=config, folder=tmp_path, tag="two_universal", steps=ON_ONE, save_as="one")
    assert difference(run["saved"], alone["loaded"]) is None
    assert alone["active"] == run["active"][SAVED_AFTER:][:ON_ONE]
    assert alone["trained"]

    convert(tmp_path, "one", compact=compact)
    for report in four_ranks.run(go_on, config=config, folder=tmp_path, tag="one_universal", steps=3):
        assert difference(alone["saved"], report["loaded"]) is None
        assert report["active"] == run["active"][SAVED_AFTER + ON_ONE :]
        assert report["trained"]
    assert len(set(run["active"][SAVED_AFTER:])) > 1  # draws were compared


# ---- weights alone, and what is refused -----------------------------------------------------------------------------


def save(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    with engine_of(config) as engine:
        train(engine, SAVED_AFTER)
        engine.save_checkpoint(folder, tag="here")
        return snapshot(engine.module)


def load(config: dict[str, Any], folder: Path, layers: int = LAYERS, tag: Any = "here_universal", **how: Any) -> Any:
    """The weights, whether anything but them came along, and the error."""
    config["checkpoint"] = {"load_universal": True}
    with engine_of(config, tiny_llama(layers, seed=9)) as engine:
        fresh = engine.optimizer.controller.fingerprint()
        try:
            engine.load_checkpoint(folder, tag=tag, **how)
        except ValueError as error:
            return str(error)
        assert engine.optimizer.controller.fingerprint() == fresh
        assert optimizer_state(engine) == {}
        weights = snapshot(engine.module)
        train(engine, 3)
        return weights


@pytest.mark.parametrize(("saved_by", "stage"), [("grass", 3), ("stock", 1)])
def test_the_weights_can_be_loaded_alone(
    two_ranks: Any, one_rank: Any, saved_by: str, stage: int, tmp_path: Path
) -> None:
    config = ds_config(stage=stage, dtype="bf16", grass=grass_block())
    stock = {key: value for key, value in config.items() if key != "grass"}
    [saved, _] = two_ranks.run(save, config=config if saved_by == "grass" else stock, folder=tmp_path)
    convert(tmp_path, "here", inject=saved_by == "stock")
    [weights] = one_rank.run(load, config=config, folder=tmp_path, load_module_only=True)
    assert difference(saved, weights) is None
    if saved_by == "stock":
        [error] = one_rank.run(load, config=config, folder=tmp_path)
        assert error.startswith("the checkpoint was not written by grass_ds")
        assert "load_module_only=True" in error


def test_what_does_not_fit_or_is_broken_is_refused_on_every_rank(two_ranks: Any, tmp_path: Path) -> None:
    config = ds_config(stage=2, grass=grass_block(sampler="uniform"))
    two_ranks.run(save, config=config, folder=tmp_path)
    files = convert(tmp_path, "here") / "zero"

    def errors(**how: Any) -> str:
        one, other = two_ranks.run(load, **{"config": config, "folder": tmp_path, **how})
        assert isinstance(one, str)
        assert one == other or one in other or other in one  # one rank's, or what another says of it
        return max(one, other, key=len)

    assert "holds no universal checkpoint" in errors(tag="there")
    assert "optimizer_state.pt is missing" in errors(tag="here")
    assert "was saved with ZeRO stage 1 or 2 and this run has stage 3" in errors(
        config=ds_config(stage=3, grass=grass_block()), tag=None
    )
    assert f"model.layers.{LAYERS - 1}" in errors(layers=LAYERS - 1)
    amsgrad = {"torch_adam": True, "amsgrad": True}
    assert "max_exp_avg_sq" in errors(config=ds_config(optimizer={"params": amsgrad}, grass=grass_block()))
    last = files / "model.layers.0.post_attention_layernorm.weight" / "fp32.pt"  # rank 1 alone has a part of it
    content = last.read_bytes()
    last.write_bytes(content[:100])
    assert f"{last} cannot be read" in errors()
    last.unlink()
    assert f"lacks {last}" in errors()
    last.write_bytes(content)
    (files / "lm_head.weight" / "fp32.pt").write_bytes(content)
    assert "lm_head.weight/fp32.pt holds 32 elements, the parameter has 4096" in errors()
    (files / "optimizer_state.pt").write_bytes(b"")
    assert "optimizer_state.pt cannot be read" in errors()
