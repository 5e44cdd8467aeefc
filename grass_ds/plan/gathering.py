# SPDX-License-Identifier: Apache-2.0
"""Weights that ZeRO-3 has gathered, in elements.

DeepSpeed keeps a gathered weight that is used again within ``stage3_max_reuse_distance`` elements of the pass: on the way
up, those of the blocks from which there and back is not farther. It gathers ``stage3_prefetch_bucket_size`` elements
ahead. Weights below ``stage3_param_persistence_threshold`` stay gathered between steps.
"""

from collections.abc import Iterable, Sequence

from grass_ds.core.units import Unit
from grass_ds.plan.run_shape import GatherSettings, RunShape


def persistent_numel(units: Iterable[Unit], settings: GatherSettings) -> int:
    """Of the weights that stay gathered."""
    return sum(size for unit in units for size in unit.sizes if size < settings.persistence)


def _numels(units: Sequence[Unit], blocks: int, settings: GatherSettings) -> tuple[list[int], int, int]:
    """Elements that come and go: of each block, of what is above the blocks, and of the largest weight of a block."""
    numels, outside, largest = [0] * blocks, 0, 0
    for unit in units:
        sizes = [size for size in unit.sizes if size >= settings.persistence]
        if unit.depth is not None:
            numels[unit.depth] += sum(sizes)
            largest = max([largest, *sizes])
        elif unit.kind != "embed":
            outside += sum(sizes)
    if not outside:  # the head is the embeddings
        outside = sum(unit.numel for unit in units if unit.kind == "embed")
    return numels, outside, largest


def gathered_numel(units: Sequence[Unit], run: RunShape, blocks: int, index: int, lowest: int) -> int:
    """In backward of block ``index``, or at the loss if that is the number of blocks; ``lowest``: backward ends there."""
    numels, outside, largest = _numels(units, blocks, run.gather)
    above, kept = outside, 0
    stays = []
    for block in range(blocks - 1, -1, -1):
        stays.append(2 * above <= run.gather.reuse_distance and block >= lowest)
        above += numels[block]
    stays.reverse()
    kept = sum(numel for block, numel in enumerate(numels[: index + 1]) if stays[block])
    if index == blocks:
        return kept + outside
    ahead = min(run.gather.prefetch, 0 if stays[max(index - 1, 0)] else numels[max(index - 1, 0)])
    if stays[index]:
        return kept + ahead
    together = 2 * numels[index] <= run.gather.reuse_distance and run.checkpointing
    return kept + (numels[index] if together else largest) + ahead


def gathers_per_step(units: Sequence[Unit], run: RunShape, blocks: int, lowest: int) -> int:
    """Elements gathered in one micro-batch: all in forward, and again in backward what was not kept."""
    numels, outside, _ = _numels(units, blocks, run.gather)
    embed = sum(unit.numel for unit in units if unit.kind == "embed" and unit.numel >= run.gather.persistence)
    total = sum(numels) + outside + (0 if outside == embed else embed)
    above = outside
    for block in range(blocks - 1, lowest - 1, -1):
        again = 2 * above > run.gather.reuse_distance
        # Recomputing takes the block's weights a second time if they do not even stay for its own backward.
        twice = run.checkpointing and 2 * numels[block] > run.gather.reuse_distance
        total += numels[block] * (again + twice)
        above += numels[block]
    return total + (outside if run.gather.reuse_distance == 0 else 0)
