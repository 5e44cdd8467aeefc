# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a resumed run is the uninterrupted one, bit for bit, and DeepSpeed's own tools can read what was saved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LAYERS, ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.observed import difference, fp16_allowed, observe, optimizer_state

pytestmark = pytest.mark.dist

# With 2 probe steps and a draw every 3: in the probe, on a switch, within a period, on a switch that also refreshes the scores.
PROBE_STEPS, STEPS = 2, 12
SAVED_AFTER = {"mid-probe": 1, "switch": 5, "mid-period": 7, "switch and refresh": 8}
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 4, "total_num_steps": 20, "warmup_max_lr": 1e-2}}

ZERO3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}

# name -> (ds_config arguments, grass settings)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grass-bf16-zero2-cpu": ({"dtype": "bf16"}, {"sampler": "grass", "num_active_layers": 2}),
    "grass-bf16-zero1-device-gas2": (
        {"dtype": "bf16", "stage": 1, "gas": 2, "clip": 0.5},
        {"offload": {"device": "none"}},
    ),
    "static-fp32-zero2-device-reset": (
        {},
        {"sampler": "static", "state_on_switch": "reset", "offload": {"device": "none"}, "always_active": []},
    ),
    "cyclic-fp32-zero1-cpu-reset": ({"stage": 1}, {"sampler": "cyclic", "state_on_switch": "reset"}),
    "uniform-bf16-zero2-cpu-gas2": (
        {"dtype": "bf16", "gas": 2},
        {"sampler": "uniform", "always_active": ["embed", "head"]},
    ),
    "grass-bf16-zero3-cpu": ({"dtype": "bf16", "stage": 3, "clip": 0.5}, {"sampler": "grass", "num_active_layers": 2}),
    "static-fp32-zero3-device-reset": (
        {"stage": 3, "gas": 2},
        {"sampler": "static", "state_on_switch": "reset", "offload": {"device": "none"}, "always_active": ["embed"]},
    ),
    "uniform-bf16-zero3-nvme": (
        {"dtype": "bf16", "stage": 3},
        {"sampler": "uniform", "offload": {"device": "nvme", "io": "posix"}},
    ),
    "grass-fp16-zero2-overflow": (
        {"dtype": "fp16", "fp16": {"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3}},
        {"sampler": "grass"},
    ),
}


def straight_and_resumed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One straight run that saves on the way; from each checkpoint a fresh engine with other weights and another seed."""
    with fp16_allowed():
        history: list[dict[str, Any]] = []
        with engine_of(copy.deepcopy(config)) as engine:

            def note(step: int) -> None:
                for tag, after in SAVED_AFTER.items():
                    if step + 1 == after:
                        engine.save_checkpoint(folder, tag=tag)
                history.append(observe(engine))

            losses = train(engine, STEPS, after_step=note)
        report: dict[str, Any] = {"active": [seen["active"] for seen in history], "skipped": history[-1]["steps"][1]}
        other = copy.deepcopy(config)
        other["grass"]["seed"] = 1234
        for tag, after in SAVED_AFTER.items():
            with engine_of(copy.deepcopy(other), tiny_llama(seed=9)) as engine:
                fresh = engine.grass.active_layers
                engine.load_checkpoint(folder, tag=tag)
                found = difference(history[after - 1], observe(engine), "loaded") or continued(
                    engine, history, losses, after
                )
                report[tag] = {"difference": found, "fresh": fresh, "saved": history[after - 1]["active"]}
        return report


def continued(engine: Any, history: list[dict[str, Any]], losses: list[float], after: int) -> str | None:
    """Train from step ``after`` to the end; where that differs from the straight run first."""
    seen: list[dict[str, Any]] = []
    again = train(engine, STEPS - after, start=after, after_step=lambda _: seen.append(observe(engine)))
    found = (difference(history[after + i], now, f"step {after + i + 1}") for i, now in enumerate(seen))
    return next(filter(None, found), None) or difference({"losses": losses[after:]}, {"losses": again})


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_the_straight_run(two_ranks: Any, case: str, tmp_path: Path) -> None:
    settings, sampler = CASES[case]
    config = ds_config(**settings, scheduler=SCHEDULER, grass=grass_block(**sampler))
    if "nvme" in case:
        config["grass"]["offload"]["nvme_path"] = str(tmp_path / "state")
        (tmp_path / "state").mkdir()
    for report in two_ranks.run(straight_and_resumed, config=config, folder=tmp_path):
        assert len(set(report["active"])) > 2
        assert {tag: report[tag]["difference"] for tag in SAVED_AFTER} == dict.fromkeys(SAVED_AFTER)
        # Loading had to change the active set, or the load's own switch would not be tested.
        assert any(report[tag]["fresh"] != report[tag]["saved"] for tag in SAVED_AFTER)
        assert (report["skipped"] > PROBE_STEPS) == ("overflow" in case)


# ---- what is in a checkpoint --------------------------------------------------------------------------------------------


def read_back(config: dict[str, Any], tied: bool, folder: Path) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with engine_of(config, tiny_llama(tied=tied)) as engine:
        train(engine, 6)
        engine.save_checkpoint(folder, tag="here")
        masters = {name: safe_get_full_fp32_param(param) for name, param in engine.module.named_parameters()}
        live = {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}
        visits = engine.grass.visits
    merged = get_fp32_state_dict_from_zero_checkpoint(folder, tag="here")
    file = torch.load(folder / "here" / "mp_rank_00_model_states.pt", weights_only=False)
    plain = tiny_llama(tied=tied, seed=3).to(torch.bfloat16)
    plain.load_state_dict(file["module"], strict=True)
    return {
        "visits": visits,
        "merged": difference(masters, {name: merged[name] for name in masters}),
        "head": torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]),
        "names": sorted(merged) == sorted(live),
        "plain": difference(live, plain.state_dict()),
        "rounded": max(float((masters[name] - live[name].float()).abs().max()) for name in masters),
        "frozen": file.get("frozen_param_fragments"),
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tools_read_every_layer(two_ranks: Any, tied: bool, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", lr=1e-2, grass=grass_block())
    for report in two_ranks.run(read_back, config=config, tied=tied, folder=tmp_path):
        assert 0 in report["visits"]  # a layer that was never trained, without state of its own
        assert any(report["visits"])
        assert report["rounded"] > 0  # masters say more than the weights do
        assert report["merged"] is None
        assert report["names"]
        assert report["head"] is tied
        assert report["plain"] is None
        assert not report["frozen"]  # inactive layers are not stored a second time as frozen ones


def read_back_from_parts(config: dict[str, Any], tied: bool, folder: Path) -> dict[str, Any]:
    """ZeRO-3: the merged fp32 weights and the consolidated ones, next to the live ones. One layer norm is frozen by the user."""
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = tiny_llama(tied=tied)
    frozen = "model.layers.1.input_layernorm.weight"
    model.get_parameter(frozen).requires_grad_(False)
    with engine_of(config, model) as engine:
        train(engine, 6)
        engine.save_checkpoint(folder, tag="here")
        engine.save_16bit_model(folder, "whole.bin")
        live, visits = snapshot(model), engine.grass.visits
        masters = {n: safe_get_full_fp32_param(p) for n, p in model.named_parameters() if n != frozen}
        train(engine, 1, start=6)  # saving left all as it was
    merged = get_fp32_state_dict_from_zero_checkpoint(folder, tag="here")
    whole = torch.load(folder / "whole.bin")
    return {
        "visits": visits,
        "merged": difference({**masters, frozen: live[frozen].float()}, {name: merged[name].float() for name in live}),
        "names": sorted({*merged} ^ {*tiny_llama(tied=tied).state_dict()}),
        "whole": difference(live, {name: whole[name] for name in live}),
        "rounded": max(float((master - live[name].float()).abs().max()) for name, master in masters.items()),
    }


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tools_read_every_layer_of_zero3(two_ranks: Any, tied: bool, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", lr=1e-2, zero_optimization=ZERO3, grass=grass_block())
    for report in two_ranks.run(read_back_from_parts, config=config, tied=tied, folder=tmp_path):
        assert 0 in report["visits"]
        assert any(report["visits"])
        assert report["rounded"] > 0
        assert report["merged"] is report["whole"] is None
        assert report["names"] == []


def exclude_frozen(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    model = tiny_llama()
    frozen = ["model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    with engine_of(config, model) as engine:
        train(engine, 4)
        engine.save_16bit_model(folder, "lean.bin", exclude_frozen_parameters=True)
        engine.save_16bit_model(folder, "full.bin")
        engine.save_checkpoint(folder, tag="lean", exclude_frozen_parameters=True)
        after = sorted(name for name, param in model.named_parameters() if param.requires_grad)
        active = engine.grass.active_layers
        live = snapshot(model)
    lean, full = torch.load(folder / "lean.bin"), torch.load(folder / "full.bin")
    [path, *_] = sorted((folder / "lean").glob("*mp_rank_00_model_states.pt"))
    file = torch.load(path, weights_only=False)
    return {
        "frozen": frozen,
        "active": active,
        "trainable": after,
        "left out": sorted(set(live) - set(lean)),
        "left out of the checkpoint": sorted(set(live) - set(file["module"])),
        "lean": difference(lean, {name: live[name] for name in lean}),
        "full": difference(full, live),
        "unfrozen": sorted(name for name, param in model.named_parameters() if not param.requires_grad),
    }


@pytest.mark.parametrize("zero", [{"stage": 2}, ZERO3], ids=["zero2", "zero3"])
def test_exclude_frozen_drops_what_the_user_froze_and_nothing_else(
    two_ranks: Any, zero: dict[str, Any], tmp_path: Path
) -> None:
    config = ds_config(zero_optimization=zero, grass=grass_block())
    for report in two_ranks.run(exclude_frozen, config=config, folder=tmp_path):
        [layer] = report["active"]
        assert all(
            name == "model.norm.weight" or name.startswith(f"model.layers.{layer}.") for name in report["trainable"]
        )
        assert report["left out"] == report["left out of the checkpoint"] == sorted(report["frozen"])
        assert report["lean"] is report["full"] is None
        assert report["unfrozen"] == sorted(report["frozen"])  # also after the engine is gone


# ---- what is refused, and restarts from weights ------------------------------------------------------------------------


def save(config: dict[str, Any], folder: Path, steps: int = 4) -> dict[str, torch.Tensor]:
    with engine_of(config) as engine:
        train(engine, steps)
        engine.save_checkpoint(folder, tag="here")
        return snapshot(engine.module)


def error_of_load(config: dict[str, Any], folder: Path, layers: int = LAYERS, split: bool = False) -> str:
    model = tiny_llama(layers)
    arguments = {}
    if split:
        bare = [p for p in model.parameters() if p.ndim == 1]
        arguments["model_parameters"] = [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": bare, "weight_decay": 0.0},
        ]
    with engine_of(config, model, **arguments) as engine:
        before = engine.grass.active_layers
        try:
            engine.load_checkpoint(folder, tag="here")
        except Exception as error:
            trainable = {
                int(n.split(".")[2]) for n, p in model.named_parameters() if p.requires_grad and ".layers." in n
            }
            assert trainable == set(engine.grass.active_layers) == set(before)
            return f"{type(error).__name__}: {error}"
    return ""


def test_another_number_of_ranks_is_refused(two_ranks: Any, one_rank: Any, tmp_path: Path) -> None:
    config = ds_config(grass=grass_block())
    two_ranks.run(save, config=config, folder=tmp_path)
    [message] = one_rank.run(error_of_load, config=config, folder=tmp_path)
    assert message.startswith("ValueError: the checkpoint here was saved by 2 ranks and this run has 1")
    assert f"deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {tmp_path / 'here'}" in message


def test_another_model_or_other_param_groups_are_refused_on_every_rank(two_ranks: Any, tmp_path: Path) -> None:
    config = ds_config(grass=grass_block())
    two_ranks.run(save, config=config, folder=tmp_path)
    for message in two_ranks.run(error_of_load, config=config, folder=tmp_path, layers=LAYERS - 1):
        assert f"model.layers.{LAYERS - 1}" in message
    for message in two_ranks.run(error_of_load, config=config, folder=tmp_path, split=True):
        assert message.startswith("ValueError: the checkpoint here has other layers or param groups than this run")
        assert "model.layers.0/1" in message


def test_a_checkpoint_of_plain_deepspeed_is_refused_with_the_remedy(two_ranks: Any, tmp_path: Path) -> None:
    two_ranks.run(save, config=ds_config(), folder=tmp_path)
    for message in two_ranks.run(error_of_load, config=ds_config(grass=grass_block()), folder=tmp_path):
        assert message.startswith("ValueError: the checkpoint was not written by grass_ds")
        assert "load_optimizer_states=False" in message


@pytest.mark.parametrize(("saved", "loaded"), [(2, 3), (3, 2), (3, 1)])
def test_a_checkpoint_of_another_cut_is_refused_with_the_remedy(
    two_ranks: Any, saved: int, loaded: int, tmp_path: Path
) -> None:
    two_ranks.run(save, config=ds_config(stage=saved, grass=grass_block()), folder=tmp_path)
    for message in two_ranks.run(error_of_load, config=ds_config(stage=loaded, grass=grass_block()), folder=tmp_path):
        was = "3" if saved == 3 else "1 or 2"
        assert (
            f"ValueError: the checkpoint here was saved with ZeRO stage {was} and this run has stage {loaded}"
            in message
        )
        assert "zero_to_fp32.py" in message


def restart(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    with engine_of(config, tiny_llama(seed=9)) as engine:
        engine.load_checkpoint(folder, tag="here", load_optimizer_states=False, load_lr_scheduler_states=False)
        loaded, state = snapshot(engine.module), optimizer_state(engine)
        phase, visits = engine.grass.phase, engine.grass.visits
        losses = train(engine, 4)
        return {
            "weights": loaded,
            "state": state,
            "phase": phase,
            "visits": visits,
            "losses": losses,
            "end": snapshot(engine.module),
        }


def from_weights(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    model = tiny_llama(seed=9)
    model.load_state_dict(weights)
    with engine_of(config, model) as engine:
        return {"losses": train(engine, 4), "end": snapshot(engine.module)}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("saved_by", ["grass", "stock"])
def test_restart_from_weights_alone(two_ranks: Any, saved_by: str, stage: int, tmp_path: Path) -> None:
    config, plain = ds_config(stage=stage, grass=grass_block()), ds_config(stage=stage)
    [weights, _] = two_ranks.run(save, config=config if saved_by == "grass" else plain, folder=tmp_path)
    reference = two_ranks.run(from_weights, config=config, weights=weights)
    for report, fresh in zip(two_ranks.run(restart, config=config, folder=tmp_path), reference, strict=True):
        assert difference(weights, report["weights"]) is None
        assert report["state"] == {}
        assert report["phase"] == "probe"
        assert not any(report["visits"])
        assert report["losses"] == fresh["losses"]
        assert difference(report["end"], fresh["end"]) is None


def weights_of_a_tag(config: dict[str, Any], folder: Path) -> list[str | None]:
    with engine_of(config) as engine:
        train(engine, 4)
        engine.save_checkpoint(folder, tag="here")
        weights = snapshot(engine.module)
        train(engine, 2, start=4)
        engine.save_checkpoint(folder, tag="later")
    found = []
    for alone in ({"load_optimizer_states": False}, {"load_module_only": True}):
        with engine_of(config, tiny_llama(seed=9)) as engine:
            engine.load_checkpoint(folder, tag="here", load_lr_scheduler_states=False, **alone)
            found.append(difference(weights, snapshot(engine.module)))
            assert (optimizer_state(engine), engine.grass.phase) == ({}, "probe")
            train(engine, 4)
            found.append(None if difference(weights, snapshot(engine.module)) else "it did not train")
    return found


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("threshold", [0, 100])
def test_weights_alone_are_those_of_the_tag(two_ranks: Any, stage: int, threshold: int, tmp_path: Path) -> None:
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    config = ds_config(dtype="bf16", zero_optimization=zero, grass=grass_block())
    assert two_ranks.run(weights_of_a_tag, config=config, folder=tmp_path) == [[None] * 4] * 2
