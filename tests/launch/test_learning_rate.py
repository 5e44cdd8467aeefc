# SPDX-License-Identifier: Apache-2.0
"""The learning-rate schedule of launch/train.py spans the steps that train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import tiny_llama
from transformers import TrainingArguments

from benchmarks.case import Case
from benchmarks.measure.engine import training_steps
from grass_ds.config import GrassConfig
from grass_ds.sampling.controller import Controller
from launch.hf_trainer import GrassTrainer

# block, steps of either kind, those of them that train
SPANS: list[tuple[dict[str, Any], int, int]] = [
    ({"probe_steps": 3}, 9, 6),
    ({"probe_steps": 3, "reprobe_period": 2}, 9, 3),  # 3 + 2 + 3 + 1
    ({"probe_steps": 3, "reprobe_period": 2, "sampler": "static"}, 9, 6),
    ({"probe_steps": 3, "reprobe_period": 2, "sampler": "uniform"}, 9, 9),
    ({"probe_steps": 3, "num_active_layers": 12}, 9, 9),
]


@pytest.mark.parametrize(("block", "steps", "training"), SPANS, ids=str)
def test_it_falls_to_zero_with_the_last_step_that_trains(
    tmp_path: Path, block: dict[str, Any], steps: int, training: int
) -> None:
    settings = TrainingArguments(
        str(tmp_path), use_cpu=True, lr_scheduler_type="linear", warmup_steps=0, report_to=[], max_steps=steps
    )
    controller = Controller(12, **GrassConfig(**block).controller_arguments())
    trainer = GrassTrainer(tiny_llama(layers=1), settings, probe_steps_within=controller.probe_steps_within)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = trainer.create_scheduler(steps, optimizer)
    rates = []
    for _ in range(training):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([1.0 - step / training for step in range(1, training + 1)])
    case = Case(kind="quality", method="grass", grass=block, steps=steps)
    assert training_steps(case, num_layers=12) == training  # the benchmarks count alike
