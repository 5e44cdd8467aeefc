# SPDX-License-Identifier: Apache-2.0
"""The small run whose costs the tests work out by hand, in every ZeRO stage. Run inside a rank."""

from typing import Any

from torch import nn

from helpers.models import VOCAB, tiny_llama

HIDDEN, LAYERS, PERIOD = 24, 4, 2
ALIGNMENT = 8  # shards are multiples of this many elements
PAGE = 4096  # bytes: tensors in a buffer are a multiple of it
STEP_COUNT = 4  # bytes: torch's AdamW keeps a float32 step count per tensor
GRAIN = 1024  # elements: device buffers are a multiple of it
WORLD = {"one_rank": 1, "two_ranks": 2, "four_ranks": 4}
# Elements of the parameters of a unit.
_BLOCK = [param.shape for param in tiny_llama(hidden=HIDDEN, layers=1).model.layers.parameters()]
LAYER = [shape.numel() for shape in _BLOCK]
MATRICES = [[shape.numel()] for shape in _BLOCK if len(shape) > 1]
VECTORS = [shape.numel() for shape in _BLOCK if len(shape) == 1]
NORM, EMBED = [HIDDEN], [VOCAB * HIDDEN]


def width(config: dict[str, Any]) -> int:
    """Bytes of a weight, and of a gradient on the wire."""
    return 2 if "bf16" in config else 4


def model_for(config: dict[str, Any]) -> nn.Module:
    """In the dtype of the run, so that initialize() has nothing to convert."""
    model = tiny_llama(hidden=HIDDEN, layers=LAYERS)
    return model.bfloat16() if "bf16" in config else model


def part(numel: int, parts: int) -> int:
    return -(-numel // parts)


def shard(sizes: list[int], world: int, stage: int) -> int:
    """Elements of a unit on every rank: ZeRO-3 cuts every parameter, ZeRO-1 and 2 the whole unit."""
    owned = sum(part(size, world) for size in sizes) if stage == 3 else part(sum(sizes), world)
    return part(owned, ALIGNMENT) * ALIGNMENT


def layers_of(config: dict[str, Any]) -> list[list[int]]:
    """Elements of the parameters of every layer that the sampler draws from: blocks, or single matrices."""
    return MATRICES * LAYERS if config["grass"].get("sampler") == "module" else [LAYER] * LAYERS


def weight_bytes(config: dict[str, Any], world: int) -> int:
    """The model as it rests on one rank: whole in ZeRO-1 and 2, its partitions in ZeRO-3."""
    stage = config["zero_optimization"]["stage"]
    units = [*layers_of(config), EMBED, EMBED, NORM]
    if config["grass"].get("sampler") == "module":
        units.append(VECTORS * LAYERS)  # in a unit that never trains
    shards = sum(shard(unit, world, stage) for unit in units)
    return width(config) * shards * (world if stage < 3 else 1)


def state_format(config: dict[str, Any]) -> str:
    return str(config["grass"].get("offload", {}).get("state_format", "fp32"))


def planes(numel: int, name: str) -> list[int]:
    """Bytes of each tensor that the format keeps of so many elements of AdamW's state, with bf16 weights."""
    remainder, scales = [2 * numel, part(numel, 8)], 4 * part(numel, 256)
    return {
        "fp32": [4 * numel] * 3,
        "exact": [*remainder, 4 * numel, 4 * numel],
        "bf16": [*remainder, 2 * numel, 2 * numel],
        "8bit": [*remainder, numel, scales, numel, scales],
    }[name]


def state_bytes(config: dict[str, Any], layers: int | list[list[int]], world: int) -> int:
    """Optimizer state of so many blocks, or of these layers, and of the final norm on one rank, step counts aside."""
    layers, stage = [LAYER] * layers if isinstance(layers, int) else layers, config["zero_optimization"]["stage"]
    return sum(sum(planes(shard(unit, world, stage), state_format(config))) for unit in (*layers, NORM))


def buffer_bytes(config: dict[str, Any], world: int) -> int:
    """Two device buffers, each as large as the largest shard that trains: a layer's; and one that is decoded into."""
    largest = max(shard(layer, world, config["zero_optimization"]["stage"]) for layer in layers_of(config))
    numel, name = part(largest, GRAIN) * GRAIN, state_format(config)
    in_pages = sum(part(nbytes, PAGE) * PAGE for nbytes in planes(numel, name))
    return 2 * in_pages + (0 if name == "fp32" else sum(planes(numel, "fp32")))
