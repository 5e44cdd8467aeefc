# SPDX-License-Identifier: Apache-2.0
"""What a training run has measured so far, step by step."""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure.engine import micro_step, trainable_numel
from benchmarks.measure.observer import peak_bytes, reset_peak

Batch = Mapping[str, torch.Tensor]


@dataclass
class Progress:
    """The steps of a run. It is plain data, so that it can be part of a checkpoint.

    Attributes:
        losses: mean over the micro-batches of a step, before that step.
        active: layers of each step, None while probing; empty for methods that are not ours.
        curve: development loss after some steps.
        starts: how often the run was started.
        cpu_seconds, wall_seconds: of the steps alone; CPU seconds are of this process, all its threads.
        tokens: without padding. ``trainable``: elements that train in the last step that does not probe.
        peak_bytes: of this rank, in steps alone.
    """

    losses: list[float] = field(default_factory=list)
    active: list[list[int] | None] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    starts: int = 0
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    tokens: int = 0
    trainable: int = 0
    peak_bytes: float = 0.0

    def step(self, engine: Any, batches: Sequence[Batch]) -> None:
        """One optimizer step on these micro-batches."""
        grass = engine.grass
        probing = grass is not None and grass.phase == "probe"
        if grass is not None:
            self.active.append(None if probing else list(grass.active_layers))
        if not probing:
            self.trainable = trainable_numel(engine)
        self.tokens += sum(int(batch["attention_mask"].sum()) for batch in batches)
        reset_peak()
        began, began_cpu = time.perf_counter(), time.process_time()
        losses = [
            micro_step(engine, {name: value.to(engine.device) for name, value in batch.items()})["loss"]
            for batch in batches
        ]
        self.cpu_seconds += time.process_time() - began_cpu
        self.wall_seconds += time.perf_counter() - began
        self.losses.append(statistics.fmean(losses))
        self.peak_bytes = max(self.peak_bytes, peak_bytes())
