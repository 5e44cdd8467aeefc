# SPDX-License-Identifier: Apache-2.0
"""Modules that are to train and get no gradient stop the run with their names: silence would look like training."""

from typing import Any

import pytest
import torch
from helpers.models import RELEASED, VOCAB, batch, ds_config, engine_of, grass_block, loss_of, snapshot, tiny_llama
from helpers.observed import logged
from helpers.tiered import tiered
from torch import nn
from torch.utils.checkpoint import checkpoint

from grass_ds.zero.step import MissingGradientError

pytestmark = pytest.mark.dist


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Decoder(nn.Module):
    """Calls activation checkpointing itself, and has a module that only some rows use."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reentrant = reentrant
        self.embed = nn.Embedding(VOCAB, 16)
        self.projector = nn.Linear(3, 16)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.lm_head = nn.LayerNorm(16), nn.Linear(16, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor, picture: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        x = self.embed(ids)
        if picture is not None:
            x = x + self.projector(picture)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        logits = self.lm_head(self.norm(x * scale))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def trained(
    block: dict[str, Any], stage: int = 2, reentrant: bool = False, pictures: tuple[int, ...] = ()
) -> dict[str, Any]:
    """Four steps; ``pictures``: the ranks whose rows use the projector."""
    config = ds_config(stage=stage, grass=block, zero_optimization=RELEASED if stage == 3 else {})
    with engine_of(config, model=Decoder(reentrant)) as engine, logged(" no gradient reached ") as warnings:
        before = snapshot(engine.module)
        try:
            for step in range(4):
                picture = torch.ones(3) if engine.global_rank in pictures else None
                engine.backward(engine(batch(step, 0, engine.global_rank), picture))
                engine.step()
        except MissingGradientError as error:
            return {"error": str(error), "steps": engine.global_steps}
        after = snapshot(engine.module)
        moved = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
        return {"moved": moved, "warnings": warnings}


ALONE = {"always_active": ["norm"]}


@pytest.mark.parametrize(
    ("sampler", "stage"), tiered([("uniform", 2), ("grass", 2), ("grass", 1)], ("uniform", 2), ("grass", 1))
)
def test_a_model_that_checkpoints_reentrantly_below_frozen_embeddings_is_refused(
    two_ranks: Any, sampler: str, stage: int
) -> None:
    block = grass_block(sampler=sampler, **ALONE)
    for found in two_ranks.run(trained, block=block, stage=stage, reentrant=True):
        assert found["steps"] == 0
        assert "received no gradient on any rank" in found["error"] and "layers." in found["error"]
        assert "use_reentrant=False" in found["error"] and '"embed"' in found["error"]
    for found in two_ranks.run(trained, block=block, stage=stage, reentrant=False):
        assert found["moved"] == {"layers", "norm"}


def test_embeddings_that_train_make_reentrant_checkpointing_work(two_ranks: Any) -> None:
    block = grass_block(sampler="uniform", always_active=["embed", "norm"])
    for found in two_ranks.run(trained, block=block, reentrant=True):
        assert found["moved"] == {"embed", "layers", "norm"}


@pytest.mark.parametrize("stage", tiered([1, 2, 3], 2))
def test_a_named_module_that_no_row_uses_is_an_error_unless_the_setting_allows_it(two_ranks: Any, stage: int) -> None:
    block = grass_block(sampler="uniform", always_active=["norm", "other"])
    for found in two_ranks.run(trained, block=block, stage=stage):
        assert "1 of 3 active modules" in found["error"] and "projector.weight" in found["error"]
        assert "use_reentrant" not in found["error"]  # which would starve blocks
    for found in two_ranks.run(trained, block={**block, "missing_gradients": "zero"}, stage=stage):
        assert {"layers", "norm"} <= found["moved"] and found["warnings"] == []
    pictures = (1,) if stage < 3 else (0, 1)  # one rank's rows are enough
    for found in two_ranks.run(trained, block=block, stage=stage, pictures=pictures):
        assert found["moved"] == {"layers", "norm", "projector"}


@pytest.mark.parametrize("sampler", ["uniform", "full"])
def test_a_module_that_trains_by_default_and_is_not_used_is_a_warning(two_ranks: Any, sampler: str) -> None:
    """One warning on rank 0: DeepSpeed trains such models silently."""
    first, second = two_ranks.run(trained, block=grass_block(sampler=sampler))
    assert {"layers", "norm"} <= first["moved"] == second["moved"]
    assert len(first["warnings"]) == 1 and "no gradient reached projector.weight" in first["warnings"][0]
    assert second["warnings"] == []


def probed_with_zeros() -> dict[str, Any]:
    with engine_of(ds_config(grass=grass_block())) as engine:
        try:
            for step in range(3):
                engine.backward(loss_of(engine, step) * 0.0)
                engine.step()
        except ValueError as error:
            return {"error": str(error), "steps": engine.global_steps}
        return {}


def test_scores_that_are_all_0_are_refused(two_ranks: Any) -> None:
    for found in two_ranks.run(probed_with_zeros):
        assert "the gradient of every layer was 0 in all 2 probe steps" in found["error"]


def said_at_start(clippings: tuple[float | None, ...]) -> list[str]:
    """The line of engines with each of the clip norms, None for no setting; then that of one with a frozen head."""
    found, model = [], tiny_llama()
    for clip in clippings:
        config = ds_config(grass=grass_block(sampler="uniform"), gradient_clipping=clip)
        if clip is None:
            del config["gradient_clipping"]
        with logged(" active at a time") as lines, engine_of(config):
            found.append("".join(lines))
    model.lm_head.weight.requires_grad_(False)
    block = grass_block(sampler="uniform", always_active=["norm", "head"])
    with logged(" active at a time") as lines, engine_of(ds_config(grass=block), model=model):
        return [*found, "".join(lines)]


def test_one_line_says_what_never_trains_and_the_clip_in_force(two_ranks: Any) -> None:
    said = {
        None: "gradients are clipped at norm 1 (the default of DeepSpeed; gradient_clipping sets it)",
        0.5: "gradients are clipped at norm 0.5",
        0.0: "gradients are not clipped",
    }
    [*lines, frozen], second = two_ranks.run(said_at_start, clippings=tuple(said))
    assert second == [""] * 4
    sizes = {name: param.numel() for name, param in tiny_llama().named_parameters()}
    share = f"{sizes['lm_head.weight'] / sum(sizes.values()):.2%}"
    for line, clipping in zip(lines, said.values(), strict=True):
        layer = sum(size for name, size in sizes.items() if ".layers.0." in name) / sum(sizes.values())
        active = f"uniform over 4 layers at model.layers, 1 active at a time ({layer:.2%} of the weights)"
        assert f"{active}, learning rate 0.001; " in line
        assert f"never trained: embed ({share} of the weights), head ({share} of the weights)" in line
        assert line.endswith(clipping)
    trained, never = frozen.split("never trained: ")
    assert "always active: norm (" in trained and "head (" not in trained
    assert f"head ({share} of the weights, frozen or not in the optimizer)" in never
