# SPDX-License-Identifier: Apache-2.0
"""Weights that ZeRO-3 has gathered, in elements.

DeepSpeed keeps a gathered weight that is used again within ``stage3_max_reuse_distance`` elements of the pass: those
of the blocks from which the way to the loss and back is not longer. It gathers ``stage3_prefetch_bucket_size``
elements ahead. Weights below ``stage3_param_persistence_threshold`` stay gathered between steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from grass_ds.core.units import Unit
from grass_ds.plan.run_shape import GatherSettings, RunShape


def persistent_numel(units: Iterable[Unit], settings: GatherSettings) -> int:
    """Of the weights that stay gathered."""
    return sum(size for unit in units for size in unit.sizes if size < settings.persistence)


@dataclass(frozen=True)
class _Numels:
    """Elements of weights that come and go.

    Attributes:
        blocks: of each block; ``largest``, ``last``: of a block's largest and last weight.
        above, below: of what is above the blocks and of the embeddings, if these are not the same.
    """

    blocks: list[int]
    largest: int
    last: int
    above: int
    below: int

    def stay(self, distance: int, lowest: int) -> list[bool]:
        """Per block, whether its weights stay gathered from forward to backward."""
        above, found = self.above, []
        for block in range(len(self.blocks) - 1, -1, -1):
            found.append(distance > 0 and 2 * above <= distance and block >= lowest)
            above += self.blocks[block]
        return found[::-1]


def _numels(units: Sequence[Unit], blocks: int, settings: GatherSettings) -> _Numels:
    numels, above, below, largest, last = [0] * blocks, 0, 0, 0, 0
    for unit in units:
        sizes = [size for size in unit.sizes if size >= settings.persistence]
        if unit.depth is not None:
            numels[unit.depth] += sum(sizes)
            largest, last = max([largest, *sizes]), sizes[-1] if sizes else last
        elif unit.kind == "embed":
            below += sum(sizes)
        else:
            above += sum(sizes)
    return _Numels(numels, largest, last, above or below, below if above else 0)


def gathered_numel(units: Sequence[Unit], run: RunShape, blocks: int, index: int, lowest: int) -> int:
    """In backward of block ``index``, or at the loss if that is the number of blocks, down to ``lowest``."""
    numels, distance = _numels(units, blocks, run.gather), run.gather.reuse_distance
    stays = numels.stay(distance, lowest)
    kept = sum(numel for numel, stay in zip(numels.blocks[: index + 1], stays, strict=False) if stay)
    if index == blocks:
        return kept + (numels.above if distance else 0)
    below = max(index - 1, 0)
    ahead = 0 if stays[below] else min(run.gather.prefetch, numels.blocks[below])
    if stays[index]:
        return kept + ahead
    together = run.checkpointing and 2 * numels.blocks[index] <= distance
    return kept + (numels.blocks[index] if together else numels.largest) + ahead


def gathers_per_step(units: Sequence[Unit], run: RunShape, blocks: int, lowest: int, whole: bool) -> int:
    """Elements gathered in one micro-batch: all in forward, and again in backward what has not stayed.

    ``whole``: backward runs down to the embeddings.
    """
    numels, distance = _numels(units, blocks, run.gather), run.gather.reuse_distance
    stays = numels.stay(distance, lowest)
    total = sum(numels.blocks) + numels.above * (2 if distance == 0 else 1) + numels.below
    for block in range(lowest, blocks):
        total += 0 if stays[block] else numels.blocks[block]
        # Recomputed weights may not even stay for the block's own backward, which begins with the last of them.
        again = run.checkpointing and 2 * numels.blocks[block] > distance
        total += numels.blocks[block] - numels.last if again else 0
    passed = 2 * (numels.above + sum(numels.blocks))
    return total + (numels.below if whole and passed > distance else 0)
