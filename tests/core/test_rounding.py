# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding, and master weights that follow their low-precision weights."""

import pytest
import torch

from grass_ds.core.rounding import add_rounded_stochastically, follow

LOW = [torch.bfloat16, torch.float16]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(exact: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of ``dtype`` at or next below and above, as float32, by its bits."""
    near = exact.to(dtype)
    bits = near.view(torch.int16)
    away = (near.float() < exact) == (near.float() >= 0)
    other = (bits + torch.where(away, 1, -1).to(torch.int16)).view(dtype).float()
    same = near.float() == exact
    other = torch.where(same, near.float(), other)
    return torch.minimum(near.float(), other), torch.maximum(near.float(), other)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_every_sum_is_rounded_to_a_neighbour_and_right_in_the_mean(dtype: torch.dtype, scale: float) -> None:
    weights = (torch.randn(500, generator=generator()) * scale).to(dtype)
    change = torch.randn(500, generator=generator(1)) * scale * 1e-4
    exact = weights.float() + change
    below, above = neighbours(exact, dtype)
    rounds, total, source = 4000, torch.zeros(500, dtype=torch.float64), generator(2)
    for _ in range(rounds):
        moved = weights.clone()
        add_rounded_stochastically(moved, change, source)
        assert ((moved.float() == below) | (moved.float() == above)).all()
        total += moved.double()
    # The share of roundings up is binomial: six standard deviations for each of 500 elements.
    gap = (above - below).double()
    share = torch.where(gap > 0, (exact.double() - below) / gap.clamp_min(1e-30), torch.zeros_like(gap))
    deviation = gap * (share * (1 - share) / rounds).sqrt()
    assert ((total / rounds - exact).abs() <= 6 * deviation + 1e-7 * scale).all()
    # Rounded to the nearest, most of them would not move at all.
    assert ((weights.float() + change).to(dtype) == weights).float().mean() > 0.5


def test_float32_is_added_as_ever_and_equal_generators_give_equal_bits() -> None:
    weights, change = torch.randn(100, generator=generator()), torch.full((100,), 1e-3)
    moved = weights.clone()
    add_rounded_stochastically(moved, change, generator())
    assert torch.equal(moved, weights + change)
    one, other = weights.bfloat16(), weights.bfloat16()
    add_rounded_stochastically(one, change, generator(5))
    add_rounded_stochastically(other, change, generator(5))
    assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", LOW)
def test_zeros_and_the_smallest_values_are_rounded_too(dtype: torch.dtype) -> None:
    weights = torch.zeros(20_000, dtype=dtype)
    smallest = float(torch.finfo(dtype).smallest_normal) * float(torch.finfo(dtype).eps)
    change = torch.full((20_000,), smallest / 4)
    if change[0] == 0 or smallest < 1e-37:  # below what float32 itself can hold
        change = torch.full((20_000,), 1e-30)
    add_rounded_stochastically(weights, change, generator())
    assert weights.float().mean() == pytest.approx(float(change[0]), rel=0.1)


@pytest.mark.parametrize("dtype", LOW)
def test_weights_without_a_change_stay_where_they_are(dtype: torch.dtype) -> None:
    values = torch.randn(300_000, generator=generator()).to(dtype)
    values[:3] = torch.tensor([0.0, -0.0, 1.0])
    moved = values.clone()
    add_rounded_stochastically(moved, torch.zeros(len(values)), generator())
    assert torch.equal(moved, values)


@pytest.mark.parametrize("dtype", LOW)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    weights = torch.tensor([float("inf"), -float("inf"), float("nan"), -float("nan")] * 500).to(dtype)
    nan = weights.isnan()
    add_rounded_stochastically(weights, torch.full((2000,), -1e-4), generator())
    assert not weights.isfinite().any()
    assert weights[nan].isnan().all()


def test_zeros_stay_where_float32_has_no_subnormal_numbers() -> None:
    weights = torch.zeros(16, dtype=torch.bfloat16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor keeps subnormal numbers")
    try:
        add_rounded_stochastically(weights, torch.zeros(16), generator())
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(weights, torch.zeros(16, dtype=torch.bfloat16))


def positions(values: torch.Tensor) -> torch.Tensor:
    """Of float32 values among all float32 values, zeros being one."""
    bits = values.view(torch.int32).long()
    return torch.where(bits < 0, -(bits + 2**31), bits)


def test_every_remainder_of_bfloat16_follows() -> None:
    """All 2^16 - 1 floats that round to one bfloat16, without the ties, at three weights and five new ones."""
    offsets = torch.arange(-(2**15) + 1, 2**15, dtype=torch.int32)
    for start in (1.0, -0.0417, 3e-5):
        weight = torch.tensor(start).bfloat16().float()
        master = (weight.view(torch.int32) + offsets).view(torch.float32)
        assert (master.bfloat16() == weight).all()
        assert torch.equal(follow(master, master.bfloat16()), master)
        for new in (start * 1.01, start * 0.5, -start, 0.0, -0.0):
            target = torch.full_like(master, new).bfloat16()
            followed = follow(master, target)
            assert torch.equal(followed.bfloat16(), target)
            moved = positions(followed) - positions(target.float())
            assert torch.equal(moved, positions(master) - positions(weight.expand_as(master).contiguous()))


@pytest.mark.parametrize("dtype", [*LOW, torch.float32])
@pytest.mark.parametrize("zeros", [0.0, 0.3])
def test_the_way_does_not_matter(dtype: torch.dtype, zeros: float) -> None:
    """A run that looked at the master weights in between, or saved and resumed, has the same bits as one that did not."""

    def with_zeros(values: torch.Tensor, seed: int) -> torch.Tensor:
        """A share of them exactly 0, as a weight that moves on the grid of fp16 may be."""
        return torch.where(torch.rand(len(values), generator=generator(seed)) < zeros, 0.0, values)

    master = torch.randn(10_000, generator=generator()) * torch.randn(10_000, generator=generator(1)).exp()
    between = with_zeros(master * (1 + 0.1 * torch.randn(10_000, generator=generator(2))), 4).to(dtype)
    last = with_zeros(master + torch.randn(10_000, generator=generator(3)), 5).to(dtype)
    assert torch.equal(follow(follow(master, between), last), follow(master, last))
    assert torch.equal(follow(master, last).to(dtype), last)
    assert torch.equal(
        follow(follow(master, between), master.to(dtype)).view(torch.int32),
        follow(master, master.to(dtype)).view(torch.int32),
    )
