# SPDX-License-Identifier: Apache-2.0
"""Every DeepSpeed config that ships trains: two steps each under the HF Trainer, on two ranks.

The configs leave what TrainingArguments know ("auto") to the Trainer, so a loop of one's own has to fill it in.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import snapshot, tiny_llama

from launch.adapters import Lora, wrap

FOLDER = Path(__file__).resolve().parent.parent / "ds_configs"
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.json"))
LAYERS = 10  # of the model; more than any config trains at a time
# file -> (stage, sampler, layers that one update trains, trained outside the blocks)
EXPECTED: dict[str, tuple[int, str | None, int, frozenset[str]]] = {
    "badam.json": (2, "cyclic", 1, frozenset()),
    "full.json": (2, None, LAYERS, frozenset({"embed", "norm", "head"})),
    "grass.json": (2, "grass", 8, frozenset({"norm"})),
    "ist.json": (2, "ist", 2, frozenset()),
    "lisa.json": (2, "uniform", 2, frozenset({"embed", "norm", "head"})),
    "ows.json": (2, "outlier", 2, frozenset({"embed", "norm", "head"})),
    "misa.json": (2, "module", 1, frozenset()),
    "ms_swift.json": (2, "grass", 8, frozenset({"norm"})),
    "quickstart.json": (2, "grass", 2, frozenset({"norm"})),
    "zero1_grass.json": (1, "grass", 8, frozenset({"norm"})),
    "zero3_full.json": (3, None, LAYERS, frozenset({"embed", "norm", "head"})),
    "zero3_grass.json": (3, "grass", 8, frozenset({"norm"})),
    "zero3_grass_nvme.json": (3, "grass", 8, frozenset({"norm"})),
    "zero3_lisa.json": (3, "uniform", 2, frozenset({"embed", "norm", "head"})),
}
OUTSIDE = {"model.embed_tokens.weight": "embed", "model.norm.weight": "norm", "lm_head.weight": "head"}


def test_the_folder_holds_what_is_tested_here() -> None:
    assert sorted(EXPECTED) == FILES


def two_steps(file: str, folder: Path) -> dict[str, Any]:
    from helpers.trainers import hf_trainer, losses

    config = json.loads((FOLDER / file).read_text())
    if "grass" in config:
        config["grass"]["probe_steps"] = 1
        if config["grass"]["sampler"] == "outlier":
            config["grass"]["outlier_threshold"] = 3.0  # a random model has no weights that stand out more
        if config["grass"]["sampler"] == "module":
            config["grass"]["module_budget"] = 0.2  # a small model has few matrices
        if config["grass"]["offload"]["device"] == "nvme":
            assert (
                config["grass"]["offload"]["nvme_path"] == "$SLURM_TMPDIR"
            )  # a folder per job, where the cluster makes one
            config["grass"]["offload"]["nvme_path"] = str(folder)
    model = tiny_llama(layers=LAYERS).to(torch.bfloat16)
    if config.get("grass", {}).get("sampler") == "ist":
        config["grass"] |= {"num_active_layers": 2, "sample_period": 2}
        model = wrap(model, Lora.choose(4, None, None, None))
    before = snapshot(model)
    with hf_trainer(config, folder, model, max_steps=2, learning_rate=1e-2, bf16=True) as trainer:
        trainer.train()
        grass = getattr(trainer.deepspeed, "grass", None)  # without a block the engine is the stock one
        return {
            "moved": {
                name.removeprefix("base_model.model.")
                for name, weight in snapshot(model).items()
                if not torch.equal(weight, before[name])
            },
            "visits": None if grass is None else grass.visits,
            "stage": trainer.deepspeed.zero_optimization_stage(),
            "sampler": trainer.deepspeed.config.get("grass", {}).get("sampler"),
            "optimizer": type(trainer.deepspeed.basic_optimizer),
            "losses": losses(trainer),
        }


@pytest.mark.dist
@pytest.mark.parametrize("file", FILES)
def test_config_trains(two_ranks: Any, file: str, tmp_path: Path) -> None:
    stage, sampler, layers, outside = EXPECTED[file]
    for result in two_ranks.run(two_steps, file=file, folder=tmp_path):
        assert result["stage"] == stage
        assert result["sampler"] == sampler
        assert result["optimizer"] is torch.optim.AdamW  # no op to compile at the first start
        assert len(result["losses"]) == 2
        moved_layers = {name.split(".")[2] for name in result["moved"] if ".layers." in name}
        if sampler == "module":  # the first draws take matrices in order, from the first layer up
            assert moved_layers and 0 < sum(result["visits"]) < len(result["visits"])
            continue
        assert len(moved_layers) == layers
        assert {OUTSIDE[name] for name in result["moved"] if name in OUTSIDE} == outside
        if sampler is not None:
            assert {str(layer) for layer, steps in enumerate(result["visits"]) if steps} == moved_layers
