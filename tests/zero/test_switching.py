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

WAYS: tuple[dict[str, bool], ...] = ({"load_optimizer_states": False}, {"load_module_only": True})


def save(config: dict[str, Any], folder: Path, save_latest: bool) -> dict[str, torch.Tensor]:
    """The weights at the tag ``here``; a later tag has others."""
    with engine_of(config) as engine:
        train(engine, 4)
        engine.save_checkpoint(folder, tag="here", save_latest=False)
        weights = snapshot(engine.module)
        train(engine, 2, start=4)
        engine.save_checkpoint(folder, tag="later", save_latest=save_latest)
    return weights


def restart(config: dict[str, Any], folder: Path, weights: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Runs from the weights of the checkpoint, in both ways, and one that was given these weights."""
    found: list[dict[str, Any]] = []
    for way in (*WAYS, None):
        model = tiny_llama(seed=9)
        if way is None:
            model.load_state_dict(weights)
        with engine_of(config, model) as engine:
            if way is not None:
                engine.load_checkpoint(folder, tag="here", load_lr_scheduler_states=False, **way)
            run = {"start": snapshot(model), "state": optimizer_state(engine), "phase": engine.grass.phase}
            found.append({**run, "visits": engine.grass.visits, "losses": train(engine, 4), "end": snapshot(model)})
    return found


@pytest.mark.parametrize(
    ("saved_by", "stage", "threshold"),
    tiered(
        [("grass", 2, 0), ("grass", 3, 100), ("stock", 2, 0), ("stock", 3, 0)],
        ("grass", 2, 0),
        ("grass", 3, 100),
        ("stock", 3, 0),
    ),
)
def test_restart_from_weights_alone(two_ranks: Any, saved_by: str, stage: int, threshold: int, tmp_path: Path) -> None:
    zero = {"stage": stage, "stage3_param_persistence_threshold": threshold}
    plain = ds_config(zero_optimization=zero)
    config = {**plain, "grass": grass_block()}
    saving = {"config": config if saved_by == "grass" else plain, "save_latest": threshold > 0}
    [weights, _] = two_ranks.run(save, folder=tmp_path, **saving)
    for *reports, fresh in two_ranks.run(restart, config=config, folder=tmp_path, weights=weights):
        assert difference(fresh["start"], weights) is None
        assert difference(fresh["end"], weights)
        assert (fresh["state"], fresh["phase"], set(fresh["visits"])) == ({}, "probe", {0})
        assert difference(reports, [fresh] * len(WAYS)) is None
