"""The learning rate of a run that is not given one, from what trains at a time.

The rates are those of SmolLM2-135M in benchmarks/ (suite frontier): the best rate of layer sampling times the layers
that train at a time was the same from 2 to 8 layers, and 1e-4 was as good or better for more. Larger models need lower
ones; see docs/training.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grass_ds.config import GrassConfigError, parse_grass_block

FULL, ADAPTERS = 1e-4, 4e-4
# By the layers at a time. The bounds hold for at most 2 and at least 16 layers.
PER_LAYER, LARGEST, SMALLEST = 1.6e-3, 8e-4, 1e-4
EVERYWHERE = 2e-4  # embeddings and head train at every step, beside a few layers


def default(ds_config: Mapping[str, Any], adapters: bool) -> float:
    """The peak learning rate.

    Args:
        ds_config: its "grass" block says how many layers train at a time.
        adapters: LoRA adapters train.

    Raises:
        GrassConfigError: a mistake in the block, or it leaves the number of layers to ``memory_budget``.
    """
    block = parse_grass_block(ds_config)
    if adapters:
        return ADAPTERS
    if block is None or block.sampler == "full":
        return FULL
    if {"embed", "head"} & set(block.always_active or ()):
        return EVERYWHERE
    if block.sampler == "module":
        return LARGEST
    if block.memory_budget is not None:
        raise GrassConfigError(
            f"grass.memory_budget: the default learning rate needs the number of layers; set --learning_rate to "
            f"{PER_LAYER:g} / layers, between {SMALLEST:g} and {LARGEST:g} ({LARGEST / 4:g} for 8 layers)"
        )
    return min(max(PER_LAYER / block.num_active_layers, SMALLEST), LARGEST)
