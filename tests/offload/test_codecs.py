# SPDX-License-Identifier: Apache-2.0
"""Codecs of optimizer state, alone: what returns, and how far the rest is off."""

import math

import pytest
import torch
from helpers.live import LiveBytes

from grass_ds.core.rounding import follow
from grass_ds.offload.codecs import (
    BLOCK,
    CPU_PIECE,
    PIECE_BYTES,
    Bfloat16,
    Blocks,
    Codec,
    CutOff,
    Float32,
    Master,
    NoMaster,
    WholeMaster,
    dynamic_map,
    last_level_below,
    random_bits,
)

MOMENTS: list[Codec] = [Float32(), Bfloat16(), Blocks(), Blocks(root=True)]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38]


def stored_by(codec: Codec | Master, numel: int) -> list[torch.Tensor]:
    return [torch.full((plane.numel(numel),), 77, dtype=plane.dtype) for plane in codec.planes]


def through(codec: Codec, values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    stored = stored_by(codec, len(values))
    codec.encode(values, stored, seed)
    result = torch.full_like(values, 5.0)
    codec.decode(stored, result)
    return result


def through_master(codec: Master, master: torch.Tensor, weights: torch.Tensor, moved: bool = False) -> torch.Tensor:
    stored = stored_by(codec, len(master))
    codec.encode(master, stored, weights.dtype)
    result = torch.full_like(master, 5.0)
    codec.decode(stored, weights, moved, result)
    return result


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)


def moments(numel: int, seed: int = 0) -> torch.Tensor:
    """Of many magnitudes, as Adam's."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(numel, generator=generator) * torch.exp(3 * torch.randn(numel, generator=generator))


# ---- master weights -------------------------------------------------------------------------------------------------


def neighbours(high: int) -> torch.Tensor:
    """All 2^16 float32 numbers with these upper 16 bits."""
    return (torch.arange(2**16, dtype=torch.int64) + (high << 16)).to(torch.uint32).view(torch.float32)


@pytest.mark.parametrize("sign", [0, 0x8000])
def test_every_bit_of_a_master_weight_returns(sign: int) -> None:
    """All lower halves behind upper halves of every exponent with an even and an odd, a small and a large fraction."""
    for exponent in range(256):
        for fraction in (0, 1, 2, 0x3F, 0x7E, 0x7F):
            master = neighbours(sign | exponent << 7 | fraction)
            result = through_master(CutOff(), master, master.to(torch.bfloat16))
            same = bits(result) == bits(master)
            assert (same | (master.isnan() & result.isnan())).all(), (exponent, fraction)


def test_both_ties_of_an_even_weight_return() -> None:
    """Of 2^16 + 1 master weights that round to it, the outermost: 16 bits alone cannot tell them apart."""
    above, below = torch.tensor([0x3F808000, 0x3F7F8000], dtype=torch.int32).view(torch.float32)
    master = torch.stack([above, below] * 5)
    weights = master.to(torch.bfloat16)
    assert (weights == 1).all()
    assert torch.equal(through_master(CutOff(), master, weights), master)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000, CPU_PIECE, CPU_PIECE + 3])
def test_master_weights_of_any_length(numel: int) -> None:
    master = moments(numel)
    assert torch.equal(through_master(CutOff(), master, master.to(torch.bfloat16)), master)
    assert torch.equal(through_master(WholeMaster(), master, master.to(torch.float16)), master)
    assert torch.equal(through_master(NoMaster(), master, master.clone()), master)


def test_master_weights_follow_weights_that_have_moved() -> None:
    """As those that are kept whole do, ties included; however often they are asked."""
    master = torch.cat([neighbours(0x3F80), neighbours(0xBF81), moments(1000)])
    weights = (master.to(torch.bfloat16).to(torch.float32) + 0.02 * torch.randn(len(master))).to(torch.bfloat16)
    expected = follow(master, weights)
    for codec in (WholeMaster(), CutOff()):
        assert torch.equal(bits(through_master(codec, master, weights, moved=True)), bits(expected))
    assert torch.equal(expected.to(torch.bfloat16), weights)
    assert torch.equal(bits(through_master(CutOff(), expected, weights)), bits(expected))


def test_bytes_of_master_weights() -> None:
    numel = 8 * 1024
    assert sum(plane.nbytes(numel) for plane in CutOff().planes) == 2.125 * numel


# ---- moments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", MOMENTS, ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000, CPU_PIECE + 300])
def test_what_was_decoded_returns_unchanged(codec: Codec, numel: int) -> None:
    """With another seed, too: a checkpoint in fp32 of what is stored loses nothing of it."""
    values = moments(numel).abs() if codec is MOMENTS[-1] else moments(numel)
    once = through(codec, values, seed=1)
    assert torch.equal(bits(through(codec, once, seed=2)), bits(once))


@pytest.mark.parametrize("codec", MOMENTS, ids=lambda codec: type(codec).__name__)
def test_zeros_stay_zeros(codec: Codec) -> None:
    assert torch.equal(through(codec, torch.zeros(700)), torch.zeros(700))


LOSSY: list[Codec] = [Bfloat16(), Blocks(), Blocks(root=True)]
CPU = torch.device("cpu")


def neighbours_of(codec: Codec, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the codec can make of each value: the nearest below it, or itself, and the next above."""
    if isinstance(codec, Bfloat16):
        towards_zero = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
        away = ((values.view(torch.int32) & ~0xFFFF) + 0x10000).view(torch.float32)
        return torch.minimum(towards_zero, away), torch.maximum(towards_zero, away)
    levels = dynamic_map(codec is LOSSY[2], CPU)
    blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    near = torch.searchsorted(levels, blocks / scale, right=True).sub_(1).clamp_max_(len(levels) - 2)
    return tuple((levels[at] * scale).view(-1)[: len(values)] for at in (near, near + 1))  # type: ignore[return-value]


@pytest.mark.parametrize("codec", LOSSY, ids=["bf16", "blocks", "root"])
def test_a_value_becomes_one_of_its_two_neighbours_and_is_right_in_the_mean(codec: Codec) -> None:
    """The mean of n roundings of a value between neighbours a gap apart has a deviation of at most gap / (2 sqrt n)."""
    values, repeats = moments(4000), 400
    values = values.abs() if codec is LOSSY[2] else values
    below, above = neighbours_of(codec, values)
    total = torch.zeros(4000, dtype=torch.float64)
    for seed in range(repeats):
        result = through(codec, values, seed)
        assert ((result == below) | (result == above)).all()
        total += result
    error = (total / repeats - values).abs() / (above - below)
    assert error.max() < 6 / (2 * math.sqrt(repeats))
    assert not torch.equal(through(codec, values, 0), through(codec, values, 1))
    assert torch.equal(through(codec, values, 3), through(codec, values, 3))


@pytest.mark.parametrize("codec", LOSSY, ids=["bf16", "blocks", "root"])
def test_a_moment_follows_gradients_that_fall(codec: Codec) -> None:
    """In half of each block they fall, their squares to a hundredth. Rounded to the nearest, the moment stands still.

    A moment is linear in the one before, and rounding is right in the mean, so the mean moment is the exact one. Each
    rounding of x between a and b adds the variance (x - a) (b - x), which decays as the moment does.
    """
    beta, steps, numel = 0.99, 500, 64 * BLOCK
    gradients = moments(numel).abs().clamp_(0.3, 3)
    falls = torch.arange(numel) % 2 == 0
    fallen = torch.where(falls, gradients * 0.01, gradients)
    moment, exact, variance = gradients.clone(), gradients.to(torch.float64), torch.zeros(numel, dtype=torch.float64)
    for seed in range(steps):
        moment = beta * moment + (1 - beta) * fallen
        exact = beta * exact + (1 - beta) * fallen
        below, above = neighbours_of(codec, moment)
        variance = beta**2 * variance + ((moment - below) * (above - moment)).clamp_min(0).to(torch.float64)
        moment = through(codec, moment, seed)
    for part in (falls, ~falls):
        error = (moment[part] / exact[part] - 1).mean().abs()
        deviation = (variance[part] / exact[part] ** 2).sum().sqrt() / part.sum()
        assert error < 5 * deviation + 1e-4  # fp32 adds at most 2^-23 per step
        assert 5 * deviation < 0.03


def test_random_bits_are_those_of_the_hash() -> None:
    """lowbias32 in Python's integers, for positions and seeds on both sides of 2^31 and 2^32."""

    def reference(position: int, seed: int) -> int:
        state = (position * 0x9E3779B1 + seed) % 2**32
        state = ((state ^ state >> 16) * 0x7FEB352D + (seed >> 32)) % 2**32
        state = (state ^ state >> 15) * 0x846CA68B % 2**32
        return state ^ state >> 16

    for seed in (0, 1, 2**31, 2**32 - 1, 2**32, 0xFEDCBA9876543210):
        for start in (0, 2**31 - 100, 2**32 - 100):
            found = random_bits(seed, start, 200, 24, CPU)
            assert found.tolist() == [reference(start + at, seed) % 2**24 for at in range(200)]


def test_bf16_keeps_special_values() -> None:
    values = torch.tensor(SPECIAL[:5])
    assert torch.equal(bits(through(Bfloat16(), values[:4])), bits(values[:4]))
    assert through(Bfloat16(), values[4:]).isnan().all()
    largest = through(Bfloat16(), torch.tensor(SPECIAL[-2:]))
    assert (largest.abs() > 3.3e38).all() and largest[0] > 0 > largest[1]


@pytest.mark.parametrize("root", [False, True])
def test_the_dynamic_map(root: bool) -> None:
    """A decade has twice as many levels as the one below it (arXiv 2110.02861, section 1.3); the last one is 1."""
    levels = dynamic_map(root, CPU).to(torch.float64)
    assert len(levels) == (256 if root else 255) and (levels.diff() > 0).all()
    assert levels[-1] == 1 and 0 in levels
    assert levels[0] == 0 if root else torch.equal(levels, -levels.flip(0))
    levels = levels.sqrt() if root else levels
    for decade in range(7):
        inside = levels[(levels > 10.0 ** (decade - 7)) & (levels <= 10.0 ** (decade - 6))]
        assert len(inside) == 2**decade * (2 if root else 1) + (root and decade == 6)
        width = 0.9 * 10.0 ** (decade - 6) / (2 ** (decade + root))
        assert inside[:-2].diff() == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize("root", [False, True])
def test_the_level_below_is_that_of_a_search(root: bool) -> None:
    """At the levels, on both sides of them, and between: 16 numbers of every upper half of a float32 number."""
    levels = dynamic_map(root, CPU)
    bits = torch.arange(2**28, dtype=torch.int64)[:: 2**12 - 1].bitwise_left_shift(4).to(torch.uint32)
    sides = [levels, levels.nextafter(levels - 1), levels.nextafter(levels + 1)]
    ratios = torch.cat([bits.view(torch.float32), *sides])
    ratios = ratios[(ratios >= levels[0]) & (ratios <= levels[-1])]
    expected = torch.searchsorted(levels, ratios, right=True) - 1
    assert torch.equal(last_level_below(ratios, root).to(torch.int64), expected.clamp_max(len(levels) - 2))


@pytest.mark.parametrize("root", [False, True])
def test_all_codes_return_at_every_scale(root: bool) -> None:
    """With any seed: levels times scales of every exponent of fp32, down to those where levels coincide."""
    levels = dynamic_map(root, CPU)
    generator = torch.Generator().manual_seed(0)
    exponents = torch.arange(-149, 128).repeat_interleave(40)
    scales = torch.ldexp(1 + torch.rand(len(exponents), generator=generator, dtype=torch.float64), exponents)
    scales = torch.cat([scales.to(torch.float32), torch.arange(1, 200).to(torch.int32).view(torch.float32)])
    scales = scales[scales.isfinite() & (scales > 0)].unsqueeze(1)
    values = torch.nn.functional.pad(levels * scales, (0, BLOCK - len(levels))).view(-1)
    for seed in (1, 2):
        assert torch.equal(through(Blocks(root), values, seed), values)


def test_a_negative_extreme_returns_exactly() -> None:
    values = torch.linspace(-3.0, 1.0, BLOCK)
    assert through(Blocks(), values)[0] == -3.0


@pytest.mark.parametrize("scale", [1.0, 1e-35])
def test_a_second_moment_that_is_not_zero_stays_above_zero(scale: float) -> None:
    """Adam divides by its root: zero beside a first moment that is not would throw the weight far away."""
    values = torch.full((BLOCK,), scale * 1e-9)
    values[0], values[1], values[2:9] = scale, 0.0, 1e-44
    result = through(Blocks(root=True), values)
    assert (result[2:] > 0).all() and result[1] == 0


def test_a_negative_second_moment_shows() -> None:
    values = torch.ones(2 * BLOCK)
    values[3] = -1e-3
    result = through(Blocks(root=True), values)
    assert result[:BLOCK].isnan().all() and torch.equal(result[BLOCK:], values[BLOCK:])


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_shows_in_its_block_alone(value: float, root: bool) -> None:
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 5] = value
    result = through(Blocks(root), values)
    assert result[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.equal(result[:BLOCK], values[:BLOCK]) and torch.equal(result[2 * BLOCK :], values[2 * BLOCK :])


@pytest.mark.parametrize("codec", [*MOMENTS, CutOff()], ids=lambda codec: type(codec).__name__)
def test_a_shard_is_stored_alike_however_it_is_cut(codec: Codec | Master) -> None:
    values, cut = moments(CPU_PIECE + 4 * BLOCK + 40).abs(), 3 * BLOCK
    whole, first, rest = (stored_by(codec, n) for n in (len(values), cut, len(values) - cut))
    for stored, part, start in ((whole, values, 0), (first, values[:cut], 0), (rest, values[cut:], cut)):
        if isinstance(codec, Master):
            codec.encode(part, stored, torch.bfloat16)
        else:
            codec.encode(part, stored, 9, start)
    for plane, all_of_it, begin, end in zip(codec.planes, whole, first, rest, strict=True):
        assert torch.equal(plane.of(all_of_it, 0, cut), begin)
        assert torch.equal(plane.of(all_of_it, cut, len(values) - cut), end)


@pytest.mark.parametrize("codec", [*MOMENTS, CutOff()], ids=lambda codec: type(codec).__name__)
def test_temporary_memory(codec: Codec | Master) -> None:
    """The planner counts with it. Two pieces take as much as one."""
    values = moments(2 * CPU_PIECE).abs()
    stored, result, weights = stored_by(codec, len(values)), torch.empty_like(values), values.to(torch.bfloat16)
    if isinstance(codec, Codec):
        through(codec, values)  # makes the tables that are made once
    with LiveBytes(ignore=[values, result, weights, *stored]) as live:
        if isinstance(codec, Master):
            codec.encode(values, stored, torch.bfloat16)
            codec.decode(stored, weights, True, result)
        else:
            codec.encode(values, stored, 9)
            codec.decode(stored, result)
    assert live.peak <= PIECE_BYTES * CPU_PIECE + 32 * (CPU_PIECE // BLOCK)  # extremes and scales of the blocks
