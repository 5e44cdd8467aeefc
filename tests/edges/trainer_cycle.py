# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Trainer with grass_ds: train, save half-way, resume in a new Trainer, end with the same weights."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
from helpers.models import ds_config, grass_block, snapshot, tiny_llama
from helpers.observed import early_gathers_allowed
from helpers.trainers import hf_trainer

pytestmark = pytest.mark.dist
STEPS, SAVED_AFTER = 6, 3


def trained(folder: Path, resume: bool, stage: int) -> dict[str, Any]:
    """The hash of all weights after :data:`STEPS` steps, from the start or from the checkpoint after :data:`SAVED_AFTER`."""
    import grass_ds

    config = ds_config(stage=stage, clip=1.0, grass=grass_block(probe_steps=1, sample_period=2))
    adam = {"learning_rate": 1e-3, "weight_decay": 0.1}  # as in the config
    arguments: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": SAVED_AFTER, **adam}
    callbacks = [grass_ds.GrassCallback()]
    model = tiny_llama(seed=int(resume))
    with early_gathers_allowed(), hf_trainer(config, folder, model, callbacks=callbacks, **arguments) as trainer:
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED_AFTER}") if resume else None)
        weights = snapshot(trainer.model)
        digest = hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()
        return {"hash": digest, "visits": trainer.deepspeed.grass.visits, "step": trainer.state.global_step}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_trainer_ends_with_the_same_weights(two_ranks: Any, tmp_path: Path, stage: int) -> None:
    straight = two_ranks.run(trained, folder=tmp_path, resume=False, stage=stage)
    resumed = two_ranks.run(trained, folder=tmp_path, resume=True, stage=stage)
    assert straight == resumed
    assert straight[0] == straight[1]
    assert straight[0]["step"] == STEPS
    assert sum(straight[0]["visits"]) > 0
