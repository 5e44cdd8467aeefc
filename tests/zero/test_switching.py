# SPDX-License-Identifier: Apache-2.0
"""Going on from a checkpoint in another way: with another sampler, or with its weights alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LAYERS, ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.observed import difference, observe, optimizer_state
from helpers.tiered import tiered

pytestmark = pytest.mark.dist

SAVED, STEPS = 6, 5
KEPT = ("weights", "state", "visits", "lr", "loss_scale", "steps")


def change_method(config: dict[str, Any], saved: str, then: str, folder: Path) -> dict[str, Any]:
    with engine_of({**config, "grass": grass_block(sampler=saved)}) as engine:
        train(engine, SAVED)
        engine.save_checkpoint(folder, tag="here")
        before = observe(engine)
    with engine_of({**config, "grass": grass_block(sampler=then, seed=99)}, tiny_llama(seed=9)) as engine:
        engine.load_checkpoint(folder, tag="here")
        loaded, seen = observe(engine), []
        losses = train(engine, STEPS, start=SAVED, after_step=lambda _: seen.append(observe(engine)))
    return {
        "carried over": difference({key: before[key] for key in KEPT}, {key: loaded[key] for key in KEPT}),
        "scores": (before["scores"] is not None, loaded["scores"] is not None, seen[-1]["scores"] is not None),
        "phases": [loaded["phase"], *(now["phase"] for now in seen)],
        "active": [loaded["active"], *(now["active"] for now in seen)],
        "visits": [now["visits"] for now in (loaded, *seen)],
        "step counts": [counts(now) for now in (loaded, *seen)],
        "losses": losses,
    }


def counts(seen: dict[str, Any]) -> dict[int, int]:
    """Layer -> updates that its optimizer state has seen."""
    found = dict.fromkeys(range(LAYERS), 0)
    for name, state in seen["state"].items():
        if ".layers." in name:
            found[int(name.split(".")[2].split("/")[0])] = int(state["step"])
    return found


CHANGES = [("full", "grass"), ("uniform", "grass"), ("grass", "full"), ("grass", "uniform")]


@pytest.mark.parametrize(
    ("saved", "then", "stage"),
    tiered(
        [(*change, stage) for change in CHANGES for stage in (2, 3)],
        ("full", "grass", 2),
        ("uniform", "grass", 3),
        ("grass", "full", 3),
        ("grass", "uniform", 2),
    ),
)
def test_a_run_goes_on_with_another_sampler(two_ranks: Any, saved: str, then: str, stage: int, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", lr=1e-2, stage=stage)
    reports = two_ranks.run(change_method, config=config, saved=saved, then=then, folder=tmp_path)
    assert reports[0]["active"] == reports[1]["active"]
    for report in reports:
        assert report["carried over"] is None
        probing = 2 if then == "grass" else 0  # what it needs to know was not measured before
        assert report["phases"] == ["probe"] * probing + ["train"] * (STEPS + 1 - probing)
        assert report["scores"] == (saved == "grass", False, then == "grass")
        everything = tuple(range(LAYERS))
        assert all((active == everything) == (then == "full") for active in report["active"][probing:])
        for step in range(STEPS):  # whoever trains goes on counting where it was
            for layer in everything:
                grows = step >= probing and layer in report["active"][step]
                for count in ("step counts", "visits"):
                    assert report[count][step + 1][layer] - report[count][step][layer] == grows
        assert report["step counts"][0] == dict(enumerate(report["visits"][0]))
        assert any(report["visits"][0])
        assert all(loss == loss for loss in report["losses"])


# ---- weights alone --------------------------------------------------------------------------------------------------


def save(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    with engine_of(config) as engine:
        train(engine, 4)
        engine.save_checkpoint(folder, tag="here")
        return snapshot(engine.module)


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


@pytest.mark.parametrize(
    ("saved_by", "stage"),
    tiered([("grass", 2), ("grass", 3), ("stock", 2), ("stock", 3)], ("grass", 2), ("stock", 3)),
)
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


def weights_of_a_tag(config: dict[str, Any], folder: Path, save_latest: bool) -> list[str | None]:
    with engine_of(config) as engine:
        train(engine, 4)
        engine.save_checkpoint(folder, tag="here", save_latest=False)
        weights = snapshot(engine.module)
        train(engine, 2, start=4)
        engine.save_checkpoint(folder, tag="later", save_latest=save_latest)
    found = []
    for alone in ({"load_optimizer_states": False}, {"load_module_only": True}):
        with engine_of(config, tiny_llama(seed=9)) as engine:
            engine.load_checkpoint(folder, tag="here", load_lr_scheduler_states=False, **alone)
            found.append(difference(weights, snapshot(engine.module)))
            assert (optimizer_state(engine), engine.grass.phase) == ({}, "probe")
            train(engine, 4)
            found.append(None if difference(weights, snapshot(engine.module)) else "it did not train")
    return found


@pytest.mark.parametrize(("stage", "threshold"), tiered([(2, 0), (2, 100), (3, 0), (3, 100)], (2, 0), (3, 100)))
def test_weights_alone_are_those_of_the_tag(two_ranks: Any, stage: int, threshold: int, tmp_path: Path) -> None:
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    config = ds_config(dtype="bf16", zero_optimization=zero, grass=grass_block())
    for found in two_ranks.run(weights_of_a_tag, config=config, folder=tmp_path, save_latest=threshold > 0):
        assert found == [None] * 4
