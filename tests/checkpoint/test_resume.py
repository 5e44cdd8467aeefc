# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a resumed run is the uninterrupted one, bit for bit."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.models import ds_config, engine_of, grass_block, tiny_llama, train
from helpers.observed import difference, fp16_allowed, observe
from helpers.tiered import tiered

pytestmark = pytest.mark.dist

STEPS, OVERFLOW, MORE = 12, 7, 4
# With 2 probe steps, a draw every 3 and a step that is lost: in the probe, on a switch, within a period, right after
# the overflow, on a switch that also refreshes the scores. From each MORE steps are made, which bring a switch, and
# from the first three the overflow.
SAVED_AFTER = {"mid-probe": 1, "switch": 5, "mid-period": 6, "overflow": OVERFLOW, "switch and refresh": 9}
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 4, "total_num_steps": 20, "warmup_max_lr": 1e-2}}
BACKGROUND = {"checkpoint": {"async": True}}

# name -> (ds_config arguments, grass settings)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grass-bf16-zero1-device-gas2": (
        {"dtype": "bf16", "stage": 1, "gas": 2, "clip": 0.5},
        {"offload": {"device": "none"}, "always_active": []},
    ),
    "cyclic-fp32-zero1-cpu-reset": ({"stage": 1}, {"sampler": "cyclic", "state_on_switch": "reset"}),
    "grass-bf16-zero1-nvme-async": ({"dtype": "bf16", "stage": 1, **BACKGROUND}, {"num_active_layers": 2}),
    "static-fp32-zero2-device-reset": (
        {},
        {"sampler": "static", "state_on_switch": "reset", "offload": {"device": "none"}, "always_active": []},
    ),
    # saved amid the first probing, where the second begins, amid it, right after the overflow in it, and one step
    # after it
    "grass-bf16-zero2-cpu-reprobe": ({"dtype": "bf16"}, {"reprobe_period": 3, "state_on_switch": "reset"}),
    "uniform-fp32-zero2-nvme-gas2": ({"gas": 2}, {"sampler": "uniform", "always_active": ["embed", "head"]}),
    "grass-fp16-zero2-cpu-scaled": (
        {"dtype": "fp16", "fp16": {"initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3}},
        {"sampler": "grass"},
    ),
    "static-fp32-zero3-device-reset": (
        {"stage": 3, "gas": 2},
        {"sampler": "static", "state_on_switch": "reset", "offload": {"device": "none"}, "always_active": ["embed"]},
    ),
    "grass-bf16-zero3-cpu-async": (
        {"dtype": "bf16", "stage": 3, "clip": 0.5, **BACKGROUND},
        {"sampler": "grass", "num_active_layers": 2},
    ),
    "cyclic-bf16-zero2-cpu-expansion": ({"dtype": "bf16", "gas": 2}, {"sampler": "cyclic", "expansion": 0.2}),
    "grass-bf16-zero3-cpu-expansion": ({"dtype": "bf16", "stage": 3}, {"sampler": "grass", "expansion": 0.2}),
    "module-bf16-zero2-cpu-gas2": (
        {"dtype": "bf16", "gas": 2},
        {"sampler": "module", "module_budget": 0.2, "state_on_switch": "reset"},
    ),
    "module-fp32-zero3-nvme": ({"stage": 3}, {"sampler": "module", "module_budget": 0.2}),
    "outlier-fp32-zero2-cpu": ({"gas": 2}, {"sampler": "outlier", "outlier_threshold": 3.0}),
    "outlier-bf16-zero3-cpu-async": (
        {"dtype": "bf16", "stage": 3, **BACKGROUND},
        {"sampler": "outlier", "outlier_threshold": 3.0},
    ),
    "uniform-bf16-zero3-nvme": ({"dtype": "bf16", "stage": 3}, {"sampler": "uniform"}),
}


def overflow(engine: Any) -> None:
    """Let a step of this engine have gradients that are not finite, on one rank."""

    def blow_up(_: Any, __: Any, output: Any) -> None:
        if engine.global_steps == OVERFLOW - 1 and engine.global_rank == 1:
            output.loss = output.loss * float("inf")

    engine.module.register_forward_hook(blow_up)


def straight_and_resumed(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A straight run that saves on the way; from each checkpoint a fresh engine with other weights and seed."""
    with fp16_allowed():
        history: list[dict[str, Any]] = []
        with engine_of(copy.deepcopy(config)) as engine:
            overflow(engine)

            def after_step(step: int) -> None:
                for tag, after in SAVED_AFTER.items():
                    if step + 1 == after:
                        engine.save_checkpoint(folder, tag=tag)
                history.append(observe(engine))

            losses = train(engine, STEPS, after_step=after_step)
        report: dict[str, Any] = {key: [seen[key] for seen in history] for key in ("active", "phase")}
        skipped = pairwise([0, *(seen["steps"][1] for seen in history)])
        report["lost"] = [step for step, (before, after) in enumerate(skipped, 1) if after > before]
        other = copy.deepcopy(config)
        other["grass"]["seed"] = 1234
        for tag, after in SAVED_AFTER.items():
            with engine_of(copy.deepcopy(other), tiny_llama(seed=9)) as engine:
                overflow(engine)
                fresh = engine.grass.active_layers
                found = resumed(engine, folder, tag, history, losses)
                report[tag] = {"difference": found, "fresh": fresh, "saved": history[after - 1]["active"]}
                if tag == "switch and refresh":  # what it has become is of no account either
                    report["back"] = resumed(engine, folder, "mid-probe", history, losses)
        return report


def resumed(engine: Any, folder: Path, tag: str, history: list[dict[str, Any]], losses: list[float]) -> str | None:
    """Load and train on; where that differs from the straight run first."""
    after = SAVED_AFTER[tag]
    engine.load_checkpoint(folder, tag=tag)
    if found := difference(history[after - 1], observe(engine), "loaded"):
        return found
    seen: list[dict[str, Any]] = []
    steps = min(MORE, STEPS - after)
    again = train(engine, steps, start=after, after_step=lambda _: seen.append(observe(engine)))
    parts = (difference(history[after + i], now, f"step {after + i + 1}") for i, now in enumerate(seen))
    return next(filter(None, parts), None) or difference({"losses": losses[after:][:steps]}, {"losses": again})


@pytest.mark.parametrize(
    "case",
    tiered(
        CASES,
        "cyclic-fp32-zero1-cpu-reset",
        "grass-bf16-zero1-nvme-async",
        "grass-bf16-zero2-cpu-reprobe",
        "grass-fp16-zero2-cpu-scaled",
        "static-fp32-zero3-device-reset",
        "grass-bf16-zero3-cpu-async",
        "cyclic-bf16-zero2-cpu-expansion",
        "module-bf16-zero2-cpu-gas2",
        "outlier-bf16-zero3-cpu-async",
    ),
)
def test_resumed_run_is_the_straight_run(two_ranks: Any, case: str, tmp_path: Path) -> None:
    settings, sampler = copy.deepcopy(CASES[case])
    if "nvme" in case:
        (tmp_path / "state").mkdir()
        sampler["offload"] = {"device": "nvme", "io": "posix", "nvme_path": str(tmp_path / "state")}
    config = ds_config(**settings, scheduler=SCHEDULER, grass=grass_block(**sampler))
    for report in two_ranks.run(straight_and_resumed, config=config, folder=tmp_path):
        assert {tag: report[tag]["difference"] for tag in SAVED_AFTER} == dict.fromkeys(SAVED_AFTER)
        assert report["back"] is None
        assert len(set(report["active"])) > 2
        # Loading had to change the active set, or the load's own switch would not be tested.
        assert any(report[tag]["fresh"] != report[tag]["saved"] for tag in SAVED_AFTER)
        again = ("train", "probe") in pairwise(report["phase"])
        assert again == ("reprobe" in case)
        probing = {1, 2} if report["phase"][0] == "probe" else set()  # these change nothing either
        lost = {*probing, OVERFLOW, *((6, 8, 12) if again else ())}
        assert set(report["lost"]) >= lost
        assert (len(report["lost"]) > len(lost)) == ("fp16" in case)
