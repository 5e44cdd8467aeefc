# SPDX-License-Identifier: Apache-2.0
"""What DeepSpeed's and Hugging Face's own tools make of a checkpoint: all layers, as they are in the live model."""

import copy
import io
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import ds_config, engine_of, grass_block, snapshot, tiny_llama, train
from helpers.observed import difference
from helpers.tiered import tiered

pytestmark = pytest.mark.dist

ZERO3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
CASES = [({"stage": 1}, False), ({"stage": 2}, True), (ZERO3, False), (ZERO3, True)]
NORM = "model.layers.1.input_layernorm.weight"


def read_back(config: dict[str, Any], tied: bool, folder: Path) -> dict[str, Any]:
    """Save in every way, and read with the tools of others."""
    from deepspeed import comm
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    from transformers import AutoModelForCausalLM

    stage = config["zero_optimization"]["stage"]
    model = tiny_llama(tied=tied)
    frozen: set[str] = set()
    if stage > 1:  # zero_to_fp32.py knows no frozen parameters of stage 1
        frozen = {NORM} if tied else {NORM, "model.embed_tokens.weight"}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    with engine_of(config, model) as engine:
        train(engine, 6)
        engine.save_checkpoint(folder, tag="here")
        engine.save_16bit_model(folder, "whole.bin")
        engine.save_16bit_model(folder, "lean.bin", exclude_frozen_parameters=True)
        engine.save_checkpoint(folder, tag="lean", exclude_frozen_parameters=True, save_latest=False)
        whole = engine._zero3_consolidated_16bit_state_dict() if stage == 3 else model.state_dict()
        if engine.global_rank == 0:
            model.save_pretrained(folder / "hf", state_dict=whole)
        live, visits = snapshot(model), engine.grass.visits
        masters = {n: safe_get_full_fp32_param(p) for n, p in model.named_parameters() if n not in frozen}
        train(engine, 1, start=6)  # saving left all as it was
        comm.barrier()
    masters |= {name: live[name].float() for name in frozen}
    merged = get_fp32_state_dict_from_zero_checkpoint(folder, tag="here")
    whole, lean = torch.load(folder / "whole.bin"), torch.load(folder / "lean.bin")
    hf = dict(AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="auto").named_parameters())
    return {
        "visits": visits,
        "masters": masters,
        "merged": difference(masters, {name: merged[name].float() for name in live}),
        "names": sorted({*merged} ^ {*tiny_llama(tied=tied).state_dict()}),
        "head": torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"]),
        "whole": difference(live, {name: whole[name] for name in live}),
        "lean": difference({name: live[name] for name in live if name not in frozen}, without_tied_head(lean, tied)),
        "lean checkpoint": sorted(without_tied_head(model_file(folder / "lean")["module"], tied).keys() ^ live.keys()),
        "frozen": sorted(frozen),
        "still frozen": sorted(name for name, param in model.named_parameters() if not param.requires_grad),
        "hf": difference(live, {name: param.detach() for name, param in hf.items()}),
        "rounded": max(float((master - live[name].float()).abs().max()) for name, master in masters.items()),
        "fragments": sorted((model_file(folder / "here").get("frozen_param_fragments") or {}).keys() - frozen),
        "sampler": sampler(folder / "here"),
    }


def without_tied_head(weights: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Under the names of ``named_parameters()``, which has a shared weight once."""
    return {name: weight for name, weight in weights.items() if not (tied and name == "lm_head.weight")}


def model_file(checkpoint: Path) -> dict[str, Any]:
    """Of rank 0."""
    [path, *_] = sorted(checkpoint.glob("*mp_rank_00_model_states.pt"))
    return torch.load(path, weights_only=False)  # type: ignore[no-any-return]


def sampler(checkpoint: Path) -> str | None:
    """How what the optimizer's file says of the sampler differs from what is left of it in a file without code."""
    [path, *_] = sorted(checkpoint.glob("*optim_states.pt"))
    ours, buffer = torch.load(path, weights_only=False)["optimizer_state_dict"]["grass"], io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    return difference(ours, torch.load(buffer, weights_only=True))


@pytest.mark.parametrize(
    ("zero", "tied"),
    tiered(CASES, *CASES[:3]),
    ids=["zero1", "zero2-tied", "zero3", "zero3-tied"],
)
def test_tools_read_every_layer(two_ranks: Any, zero: dict[str, Any], tied: bool, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", lr=1e-2, zero_optimization=zero, grass=grass_block())
    reports = two_ranks.run(read_back, config=config, tied=tied, folder=tmp_path)
    for report in reports:
        assert 0 in report["visits"]  # a layer that was never trained
        assert any(report["visits"])
        assert report["rounded"] > 0  # masters say more than the weights do
        assert report["merged"] is report["whole"] is report["lean"] is report["hf"] is report["sampler"] is None
        # left out is what the user froze, never a layer that is inactive
        assert report["lean checkpoint"] == report["still frozen"] == report["frozen"]
        assert (
            report["names"] == report["fragments"] == []
        )  # no inactive layer is stored a second time as a frozen one
        assert report["head"] is tied
    if zero is ZERO3 and tied:
        command = [sys.executable, tmp_path / "zero_to_fp32.py", tmp_path, tmp_path / "merged"]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
        merged = torch.load(tmp_path / "merged" / "pytorch_model.bin", weights_only=True)
        assert (
            difference(reports[0]["masters"], {name: merged[name].float() for name in reports[0]["masters"]}) is None
        )


# ---- a plain DeepSpeed engine ---------------------------------------------------------------------------------------


def save(config: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    with engine_of(config) as engine:
        train(engine, 6)
        engine.save_checkpoint(folder, tag="here")
        return snapshot(engine.module)


def load_plain(config: dict[str, Any], folder: Path, ways: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """The weights after ``load_checkpoint`` in each of the ``ways``, without grass_ds; then train and save."""
    import deepspeed

    loaded = []
    for arguments in ways:
        model = tiny_llama(seed=9)
        engine, *_ = deepspeed.initialize(
            model=model, config=copy.deepcopy(config), model_parameters=list(model.parameters())
        )
        try:
            engine.load_checkpoint(folder, load_lr_scheduler_states=False, **arguments)
            loaded.append(snapshot(model))
            assert all(math.isfinite(loss) for loss in train(engine, 2))
            engine.save_checkpoint(folder / "plain", tag="here")
        finally:
            engine.destroy()
    return loaded


@pytest.mark.parametrize("stage", [2, 3])
def test_plain_deepspeed_loads_the_weights_and_knows_all_other_files(
    two_ranks: Any, stage: int, tmp_path: Path
) -> None:
    config = ds_config(dtype="bf16", lr=1e-2, stage=stage)
    ways = [{"load_optimizer_states": False}, *([{"load_module_only": True}] if stage == 2 else [])]
    saved, _ = two_ranks.run(save, config={**config, "grass": grass_block()}, folder=tmp_path)
    for loaded in two_ranks.run(load_plain, config=config, folder=tmp_path, ways=ways):
        assert [difference(saved, weights) for weights in loaded] == [None] * len(ways)
    ours, theirs = ({str(p.relative_to(at)) for p in at.rglob("*")} for at in (tmp_path, tmp_path / "plain"))
    ours = {name for name in ours if not name.startswith("plain")}
    assert ours - theirs == {"here/grass_rank_0.json", "here/grass_rank_1.json"}
    assert theirs - ours == set()
    assert (tmp_path / "latest").read_text() == (tmp_path / "plain" / "latest").read_text()
