# SPDX-License-Identifier: Apache-2.0
"""Geometry of the units, in one process: a reduce-scatter of flat gradients must give every rank the gradient of its
own weights.

The reference cuts whole tensors itself: ZeRO-1/2 the concatenation of a unit into ``world`` aligned parts, ZeRO-3
(DeepSpeed) every parameter into ``world`` parts of ceil(size / world), of which the last ones are short or empty.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grass_ds.core.units import PartitionedUnit, ReplicatedUnit, Unit

ALIGNMENT = 8  # shards are multiples of this many elements
KINDS = (ReplicatedUnit, PartitionedUnit)


def values(size: int, seed: int) -> torch.Tensor:
    """Small whole numbers, none of them 0: sums are exact, and padding cannot be taken for them."""
    return torch.randint(1, 100, (size,), generator=torch.Generator().manual_seed(1000 * seed + size)).float()


def cut(whole: torch.Tensor, part: int, world: int) -> list[torch.Tensor]:
    """``world`` parts, zero-padded."""
    padded = torch.zeros(part * world)
    padded[: whole.numel()] = whole
    return list(padded.split(part))


def aligned(numel: int) -> int:
    return -(-numel // ALIGNMENT) * ALIGNMENT


def shards_of(kind: type[Unit], wholes: list[torch.Tensor], world: int) -> list[torch.Tensor]:
    """What every rank must have of these tensors, from the definition."""
    if kind is ReplicatedUnit:
        whole = torch.cat(wholes)
        return cut(whole, aligned(-(-whole.numel() // world)), world)
    parts = [cut(whole, -(-whole.numel() // world), world) for whole in wholes]
    rows = [torch.cat([part[rank] for part in parts]) for rank in range(world)]
    return [cut(row, aligned(row.numel()), 1)[0] for row in rows]


def unit_of(kind: type[Unit], wholes: list[torch.Tensor], world: int, rank: int) -> Any:
    """A flattened unit of one rank; ZeRO-3's padding is whatever was in memory."""
    params = []
    for whole in wholes:
        param = nn.Parameter(whole.clone().view(-1, 1))
        if kind is PartitionedUnit:
            part = -(-whole.numel() // world)
            mine = whole[rank * part : (rank + 1) * part]
            param.ds_numel, param.ds_shape = whole.numel(), param.shape  # type: ignore[attr-defined]
            param.ds_tensor = torch.cat([mine, torch.full((part - mine.numel(),), torch.nan)])  # type: ignore[attr-defined]
            param.data = torch.empty(0)
        params.append(param)
    names = [f"p{slot}" for slot in range(len(wholes))]
    unit = kind("layer/0", "block", 0, 0, params, names, world, rank, always=False)
    unit.flatten_weights()
    return unit


geometry = {
    "kind": st.sampled_from(KINDS),
    "sizes": st.lists(st.integers(1, 70), min_size=1, max_size=5),
    "world": st.integers(1, 9),
}


@settings(max_examples=150, deadline=None)
@given(**geometry)
def test_every_rank_has_its_own_weights(kind: type[Unit], sizes: list[int], world: int) -> None:
    wholes = [values(size, slot) for slot, size in enumerate(sizes)]
    found: list[torch.Tensor] = [torch.full_like(whole, torch.nan) for whole in wholes]
    for rank, expected in enumerate(shards_of(kind, wholes, world)):
        unit = unit_of(kind, wholes, world, rank)
        assert (unit.numel, unit.shard_numel, unit.padded_numel) == (sum(sizes), len(expected), len(expected) * world)
        assert torch.equal(unit.shard, expected)  # zeros behind the weights
        assert not unit.shard[unit.saved_numel :].any()
        for slot, whole in enumerate(wholes):
            begin, start, numel = unit.overlap(slot)
            assert begin + numel <= sizes[slot] and start + numel <= unit.saved_numel
            assert torch.isnan(found[slot][begin : begin + numel]).all()  # no element has two owners
            found[slot][begin : begin + numel] = unit.shard[start : start + numel]
            view = unit.params[slot].ds_tensor if kind is PartitionedUnit else unit.params[slot]
            assert view.untyped_storage().data_ptr() == unit.shard.untyped_storage().data_ptr()
            assert kind is PartitionedUnit or torch.equal(view.flatten(), whole)
    assert all(torch.equal(mine, whole) for mine, whole in zip(found, wholes, strict=True))


@settings(max_examples=250, deadline=None)
@given(**geometry, data=st.data())
def test_reduce_scatter_of_flat_gradients_is_the_shard_of_the_sum(
    kind: type[Unit], sizes: list[int], world: int, data: st.DataObject
) -> None:
    """Every rank has gradients of its own choice of parameters, in up to three micro-steps, and none for the rest."""
    total = [torch.zeros(size) for size in sizes]
    reduced: Any = 0
    for rank in range(world):
        unit = unit_of(kind, [torch.ones(size) for size in sizes], world, rank)
        flat, filled = torch.zeros(unit.padded_numel), set()
        times = data.draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)), label=f"rank {rank}")
        for micro in range(3):
            for slot, size in enumerate(sizes):
                if micro < times[slot]:
                    gradient = values(size, 100 * rank + 10 * slot + micro)
                    unit.write_gradient(flat, slot, gradient.view(-1, 1), accumulate=slot in filled)
                    filled.add(slot)
                    total[slot] += gradient
        reduced = reduced + flat
    for mine, expected in zip(reduced.view(world, -1), shards_of(kind, total, world), strict=True):
        assert torch.equal(mine, expected)  # padding too


@pytest.mark.parametrize("part", [3, 5])
def test_partitions_of_another_world_are_refused(part: int) -> None:
    unit = unit_of(PartitionedUnit, [values(8, 0)], world=2, rank=0)
    unit.params[0].ds_tensor = torch.zeros(part)
    with pytest.raises(
        RuntimeError, match=rf"p0: {part} elements of torch.float32 on this rank, not 4 of torch.float32"
    ):
        unit.flatten_weights()
