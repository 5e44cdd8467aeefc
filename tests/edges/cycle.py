# SPDX-License-Identifier: Apache-2.0
"""One cycle of a run on every ZeRO stage, short enough for every combination of versions: parity with stock, frozen layers still, resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import RELEASED, ds_config, engine_of, grass_block, snapshot, tiny_llama, train, unit_groups
from helpers.observed import difference, early_gathers_allowed

pytestmark = pytest.mark.dist
STEPS, SAVED_AFTER = 8, 4
# gas 2: the accumulation boundary is known; an own param group per unit: stock sums in the order of ours
SETTINGS: dict[int, dict[str, Any]] = {
    1: {"stage": 1, "gas": 2},
    2: {"stage": 2, "gas": 2},
    3: {"stage": 3, "gas": 2, "zero_optimization": RELEASED},
}


def full(settings: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """Losses, and weights before and after :data:`STEPS` steps of all layers: ours with a block, stock's without."""
    model, config = tiny_llama(), ds_config(**settings, **block)
    with early_gathers_allowed(), engine_of(config, model, model_parameters=unit_groups(model)) as engine:
        initial, losses = snapshot(model), train(engine, STEPS)
        ours = getattr(engine, "grass", None) is not None
        return {"losses": losses, "initial": initial, "weights": snapshot(model), "ours": ours}


@pytest.mark.parametrize("stage", SETTINGS)
def test_full_sampler_is_stock(two_ranks: Any, stage: int) -> None:
    arguments = {"settings": SETTINGS[stage]}
    stock = two_ranks.run(full, block={}, **arguments)
    ours = two_ranks.run(full, block={"grass": {"sampler": "full"}}, **arguments)
    for mine, theirs in zip(ours, stock, strict=True):
        assert (mine["ours"], theirs["ours"]) == (True, False)
        assert mine["losses"] == theirs["losses"]
        assert difference(mine["weights"], theirs["weights"]) is None
        still = [name for name, weight in mine["weights"].items() if torch.equal(weight, mine["initial"][name])]
        assert still == []


def sampled(settings: dict[str, Any], folder: Path, checkpointing: bool) -> dict[str, Any]:
    """Train and save on the way; which weights moved at each step, and how a fresh engine goes on from the checkpoint."""

    def model() -> Any:
        made = tiny_llama()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": False})
        return made.train()

    config = ds_config(**settings, clip=1.0, grass=grass_block())
    moved: list[tuple[set[str], set[str]]] = []
    with early_gathers_allowed(), engine_of(config, model()) as engine:
        for step in range(STEPS):
            before, probing = snapshot(engine.module), engine.grass.phase == "probe"
            active = tuple(f"{engine.grass.layers[index]}." for index in engine.grass.active_layers)
            train(engine, 1, start=step)
            after = snapshot(engine.module)
            allowed = {name for name in after if ".layers." not in name or name.startswith(active)}
            changed = {name for name in after if not torch.equal(before[name], after[name])}
            moved.append((set() if probing else allowed, changed))
            if step + 1 == SAVED_AFTER:
                engine.save_checkpoint(folder)
    with early_gathers_allowed(), engine_of(config, model()) as engine:
        engine.load_checkpoint(folder)
        train(engine, STEPS - SAVED_AFTER, start=SAVED_AFTER)
        resumed = snapshot(engine.module)
    return {"moved": moved, "difference": difference(after, resumed)}


@pytest.mark.parametrize(("stage", "checkpointing"), [(1, False), (2, True), (3, False), (3, True)])
def test_only_sampled_layers_move_and_a_resumed_run_is_the_straight_one(
    two_ranks: Any, stage: int, checkpointing: bool, tmp_path: Path
) -> None:
    for report in two_ranks.run(sampled, settings=SETTINGS[stage], folder=tmp_path, checkpointing=checkpointing):
        assert report["difference"] is None
        assert [moved - allowed for allowed, moved in report["moved"]] == [set()] * STEPS
        blocks = [{name for name in moved if ".layers." in name} for _, moved in report["moved"]]
        assert [bool(names) for names in blocks] == [False] * 2 + [True] * (STEPS - 2)  # two probe steps
