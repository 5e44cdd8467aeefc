# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a run cannot go on from: every rank says why, and is as it was before it was asked."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LAYERS, ds_config, engine_of, grass_block, split_groups, tiny_llama, train
from helpers.observed import difference, observe

pytestmark = pytest.mark.dist

WEIGHTS = {"load_optimizer_states": False}
MODULE = {"load_module_only": True}


def save(config: dict[str, Any], folder: Path, tags: tuple[str, ...] = ("here",)) -> None:
    with engine_of(config) as engine:
        for tag in tags:
            train(engine, 4)
            engine.save_checkpoint(folder, tag=tag)


def refusals(
    config: dict[str, Any],
    folder: Path,
    asked: list[dict[str, Any]],
    model: dict[str, Any] | None = None,
    split: bool = False,
) -> list[str]:
    """A run is made to load in all of these ways. What it says each time; nothing of it has changed and it goes on."""
    network = tiny_llama(seed=9, **(model or {}))
    arguments = {"model_parameters": split_groups(network)} if split else {}
    said = []
    with engine_of(config, network, **arguments) as engine:
        train(engine, 3)
        for how in asked:
            before = observe(engine)
            try:
                engine.load_checkpoint(folder, **{"tag": "here", **how})
                said.append("")
            except Exception as error:
                said.append(f"{type(error).__name__}: {error}")
                assert difference(before, observe(engine)) is None
        train(engine, 2, start=3)
    return said


@pytest.mark.parametrize("state_format", ["fp32", "8bit"])
def test_another_number_of_ranks_is_refused(two_ranks: Any, one_rank: Any, state_format: str, tmp_path: Path) -> None:
    """With the commands that convert the checkpoint; compact states have to become fp32 first."""
    config = ds_config(dtype="bf16", grass=grass_block(offload={"state_format": state_format}))
    two_ranks.run(save, config=config, folder=tmp_path)
    [[message]] = one_rank.run(refusals, config=config, folder=tmp_path, asked=[{}])
    assert message.startswith("ValueError: the checkpoint here was saved by 2 ranks and this run has 1")
    source = tmp_path / "here"
    if state_format != "fp32":
        assert f"python -m grass_ds expand {source} {source}_fp32" in message
        source = tmp_path / "here_fp32"
    assert f"deepspeed.checkpoint.ds_to_universal --input_folder {source} " in message


@pytest.mark.parametrize("stage", [2, 3])
def test_another_model_or_other_param_groups_are_refused(two_ranks: Any, stage: int, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", stage=stage, grass=grass_block())
    two_ranks.run(save, config=config, folder=tmp_path)

    def ask(**other: Any) -> list[str]:
        first, second = two_ranks.run(refusals, config=config, folder=tmp_path, **other)
        assert first == second
        return first  # type: ignore[no-any-return]

    for message in ask(asked=[{}, WEIGHTS, MODULE], model={"layers": LAYERS - 1}):
        assert message.startswith("ValueError: the checkpoint here has other layers") or "another model" in message
        assert f"model.layers.{LAYERS - 1}" in message
        assert "is only in the checkpoint" in message
    for message in ask(asked=[{}, WEIGHTS, MODULE], model={"hidden": 48}):
        assert message.startswith("ValueError: the checkpoint here has ")
        assert "lm_head.weight: here [128, 48], saved [128, 32]" in message
    groups, *weights = ask(asked=[{}, WEIGHTS, MODULE], split=True)
    assert groups.startswith("ValueError: the checkpoint here has other layers or param groups than this run")
    assert "norm/1 is only here" in groups
    assert weights == ["", ""]  # these do not care


GRASS = grass_block()
CUTS: dict[str, tuple[dict[str, Any], int, tuple[str, ...]]] = {
    "plain DeepSpeed": (ds_config(), 2, ("was not written by grass_ds", "load_optimizer_states=False")),
    "2 to 3": (
        ds_config(grass=GRASS),
        3,
        ("was saved with ZeRO stage 1 or 2 and this run has stage 3", "zero_to_fp32.py"),
    ),
    "3 to 1": (
        ds_config(stage=3, grass=GRASS),
        1,
        ("was saved with ZeRO stage 3 and this run has stage 1", "zero_to_fp32.py"),
    ),
}


@pytest.mark.parametrize("case", CUTS)
def test_a_checkpoint_of_another_cut_is_refused_with_the_remedy(two_ranks: Any, case: str, tmp_path: Path) -> None:
    saved, stage, (why, remedy) = CUTS[case]
    two_ranks.run(save, config=saved, folder=tmp_path)
    config = ds_config(stage=stage, grass=GRASS)
    for [message] in two_ranks.run(refusals, config=config, folder=tmp_path, asked=[{}]):
        assert message.startswith(f"ValueError: the checkpoint here {why}")
        assert remedy in message


def test_what_is_not_there_or_was_tampered_with_is_refused(two_ranks: Any, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", grass=grass_block())
    two_ranks.run(save, config=config, folder=tmp_path, tags=("here", "late"))
    for tag in ("missing", "edited"):
        shutil.copytree(tmp_path / "here", tmp_path / tag)
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (tmp_path / "missing" / name).unlink()
    edited = torch.load(tmp_path / "edited" / name, weights_only=False)
    edited["optimizer_state_dict"]["grass"]["controller"]["step"] += 1
    torch.save(edited, tmp_path / "edited" / name)
    (tmp_path / "empty").mkdir()
    asked: list[dict[str, Any]] = [{"tag": tag} for tag in ("nowhere", "missing", "edited")]
    first, second = two_ranks.run(refusals, config=config, folder=tmp_path, asked=asked)
    assert first == second
    nowhere, missing, edited = first
    assert "nowhere is not there" in nowhere
    assert "load another: late, here" in nowhere
    assert f"{name} is missing" in missing
    assert f"{name} has " in edited
    assert all(message.startswith("ValueError") for message in first)
    for [message] in two_ranks.run(refusals, config=config, folder=tmp_path / "empty", asked=[{}]):
        assert "here is not there; there is no other checkpoint in this folder" in message
