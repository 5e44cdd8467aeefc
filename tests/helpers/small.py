# SPDX-License-Identifier: Apache-2.0
"""The small run whose costs the tests work out by hand, as far as all ZeRO stages agree on it. Run inside a rank."""

from typing import Any

from torch import nn

from helpers.models import tiny_llama

HIDDEN, LAYERS, PERIOD = 24, 4, 2
ALIGNMENT = 8  # shards are multiples of this many elements
STATE = 12  # bytes per element: fp32 weights and two moments
STEP_COUNT = 4  # bytes: torch's AdamW keeps a float32 step count per tensor
GRAIN = 1024  # elements: device buffers are a multiple of it
WORLD = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}


def width(config: dict[str, Any]) -> int:
    """Bytes of a weight, and of a gradient on the wire."""
    return 2 if "bf16" in config else 4


def model_for(config: dict[str, Any]) -> nn.Module:
    """In the dtype of the run, so that initialize() has nothing to convert."""
    model = tiny_llama(hidden=HIDDEN, layers=LAYERS)
    return model.bfloat16() if "bf16" in config else model
