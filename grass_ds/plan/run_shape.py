# SPDX-License-Identifier: Apache-2.0
"""What of a run decides its cost: the DeepSpeed config, the number of ranks and the rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grass_ds import precision
from grass_ds.config import GrassConfig, parse_grass_block
from grass_ds.core.dotted_paths import value_at


@dataclass(frozen=True)
class GatherSettings:
    """DeepSpeed's settings of ZeRO-3, in elements: how long gathered weights stay, and what is gathered ahead."""

    reuse_distance: int = 1_000_000_000
    prefetch: int = 50_000_000
    persistence: int = 100_000


@dataclass(frozen=True)
class RunShape:
    """What of a run decides its cost.

    Attributes:
        ranks: all on one machine.
        dtype: a name of :data:`grass_ds.precision.DTYPES`.
        micro_batch, sequence: rows and tokens per row; ``accumulation``: micro-batches of a step.
        grass: the block; None: adapters of ``lora_rank`` train in the stock engine.
    """

    stage: int
    ranks: int
    dtype: str
    micro_batch: int
    sequence: int
    checkpointing: bool
    accumulation: int = 1
    grass: GrassConfig | None = None
    lora_rank: int = 0
    gather: GatherSettings = GatherSettings()

    @property
    def width(self) -> int:
        """Bytes of a weight, and of its gradient."""
        return precision.DTYPES[self.dtype].itemsize

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.sequence


def run_shape(
    ds_config: Mapping[str, Any], ranks: int, sequence: int, checkpointing: bool, lora_rank: int = 0
) -> RunShape:
    """Of a DeepSpeed config without "auto"."""
    zero = ds_config.get("zero_optimization", {})
    default = GatherSettings()
    micro_batch, accumulation = _batch(ds_config, ranks)
    return RunShape(
        stage=int(value_at(ds_config, "zero_optimization.stage") or 0),
        ranks=ranks,
        dtype=next((name for name in ("bf16", "fp16") if precision.enabled(ds_config, name) is True), "fp32"),
        micro_batch=micro_batch,
        sequence=sequence,
        checkpointing=checkpointing,
        accumulation=accumulation,
        grass=parse_grass_block(ds_config),
        lora_rank=lora_rank,
        gather=GatherSettings(
            int(zero.get("stage3_max_reuse_distance", default.reuse_distance)),
            int(zero.get("stage3_prefetch_bucket_size", default.prefetch)),
            int(zero.get("stage3_param_persistence_threshold", default.persistence)),
        ),
    )


def _batch(ds_config: Mapping[str, Any], ranks: int) -> tuple[int, int]:
    """Micro-batch and accumulation; what the config leaves out follows from the rest, as in DeepSpeed."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (int(ds_config.get(name) or 0) for name in names)
    if total and not steps:
        steps = total // (micro * ranks) if micro else 1
    if total and not micro:
        micro = total // (ranks * steps)
    return max(1, micro), max(1, steps)
