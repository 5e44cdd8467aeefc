# SPDX-License-Identifier: Apache-2.0
"""HF Trainer on ZeRO-3: trains, evaluates, saves, resumes and reports a GRASS run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LAYERS, grass_block, snapshot, tiny_llama
from helpers.observed import difference, observe
from helpers.trainers import Rows, hf_trainer, losses

import grass_ds
from grass_ds.trainer import checkpoints

pytestmark = pytest.mark.dist

STEPS = 10  # 2 probing steps, a switch every 3
SAVED = {"probing": 1, "switch": 5}


def hf_config() -> dict[str, Any]:
    """What a user writes, the rest left to the Trainer."""
    params = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": params},
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "grass": grass_block(),
    }


def run_and_resume(folder: Path) -> dict[str, Any]:
    """Straight through with evaluations, then from checkpoints with a model of other weights, without any."""
    from deepspeed import comm as dist
    from transformers import AutoModelForCausalLM, IntervalStrategy

    settings = {
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "bf16": True,
        "max_grad_norm": 1.0,
        "save_steps": 1,
        "eval_steps": 2,
    }
    ends, reports = {}, {}
    for step in (0, *SAVED.values()):
        model, callback = tiny_llama(seed=step).to(torch.bfloat16), grass_ds.GrassCallback()
        settings["save_strategy"] = "no" if step else "steps"
        with hf_trainer(hf_config(), folder, model, callbacks=[callback], **settings) as trainer:
            if step == 0:
                trainer.eval_dataset, trainer.args.eval_strategy = Rows(8), IntervalStrategy.STEPS
            trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}") if step else None)
            engine = trainer.deepspeed
            ends[step] = {**observe(engine), "losses": losses(trainer)}
            if step == 0:
                reports["evaluations"] = [
                    entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
                ]
                reports["memory"], reports["peak"] = engine.grass.memory(), engine.grass.memory(peak=True)
                reports["units"] = [
                    (u.active, u.always, u.shard_numel, u in engine.optimizer.store) for u in engine.optimizer.units
                ]
                reports["rows"] = None if callback.history is None else list(callback.history.rows)
                trainer.save_model(folder / "model")
                dist.barrier()
                loaded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
                reports["saved"] = difference(snapshot(model), snapshot(loaded))
    reports["differences"] = {step: difference(ends[0], ends[step]) for step in SAVED.values()}
    return {**reports, "losses": ends[0]["losses"]}


def test_train_evaluate_save_and_resume(two_ranks: Any, tmp_path: Path) -> None:
    ranks = two_ranks.run(run_and_resume, folder=tmp_path)
    assert [checkpoints.problems(checkpoint) for checkpoint in checkpoints.checkpoints(tmp_path)] == [[]] * STEPS
    for found in ranks:
        assert found["differences"] == dict.fromkeys(SAVED.values())
        assert found["saved"] is None
        assert len(found["evaluations"]) == STEPS // 2
        assert len(set(found["evaluations"])) > 2
        assert len(found["losses"]) == STEPS
        shards = sum(numel for *_, numel, _ in found["units"])
        kept = sum(numel for *_, numel, kept in found["units"] if kept)
        assert found["memory"]["weights"]["host"] == 0
        whole = sum(p.numel() for p in tiny_llama().parameters())
        # this rank's parts in bf16, what is gathered for now, and the rotary buffer
        assert 2 * shards <= found["memory"]["weights"]["device"] + 64 <= 2 * (shards + whole) + 1024
        assert found["memory"]["gradients"] == {"device": 0, "host": 0}
        assert found["peak"]["gradients"]["device"] > 0
        assert found["memory"]["optimizer_state"]["host"] >= 12 * kept > 0
    [rows] = [found["rows"] for found in ranks if found["rows"] is not None]  # one rank keeps the history
    assert [len(row.active_layers) for row in rows][-1] == 1
    assert {len(row.active_layers) for row in rows} == {1, LAYERS}
