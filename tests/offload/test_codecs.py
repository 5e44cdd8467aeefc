# SPDX-License-Identifier: Apache-2.0
"""Codecs of optimizer state, alone: what returns, and how far the rest is off."""

import math

import pytest
import torch

from grass_ds.core.rounding import follow
from grass_ds.offload.codecs import (
    BLOCK,
    PIECE,
    Bfloat16,
    Blocks,
    Codec,
    CutOff,
    Float32,
    Master,
    NoMaster,
    WholeMaster,
    dynamic_map,
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


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000, PIECE, PIECE + 3])
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
@pytest.mark.parametrize("numel", [1, 255, 256, 257, 5000, PIECE + 300])
def test_what_was_decoded_returns_unchanged(codec: Codec, numel: int) -> None:
    """With another seed, too: a checkpoint in fp32 of what is stored loses nothing of it."""
    values = moments(numel).abs() if codec is MOMENTS[-1] else moments(numel)
    once = through(codec, values, seed=1)
    assert torch.equal(bits(through(codec, once, seed=2)), bits(once))


@pytest.mark.parametrize("codec", MOMENTS, ids=lambda codec: type(codec).__name__)
def test_zeros_stay_zeros(codec: Codec) -> None:
    assert torch.equal(through(codec, torch.zeros(700)), torch.zeros(700))


def test_bf16_takes_one_of_the_two_neighbours_and_is_right_in_the_mean() -> None:
    """The mean of n roundings of a value between neighbours a step apart has a deviation of at most step / (2 sqrt n)."""
    values, repeats = moments(4000), 400
    spacing = 2.0 ** (values.abs().log2().floor() - 7)
    total = torch.zeros(4000, dtype=torch.float64)
    for seed in range(repeats):
        result = through(Bfloat16(), values, seed)
        assert ((result - values).abs() < spacing).all()
        total += result
    error = (total / repeats - values).abs() / spacing
    assert error.max() < 6 / (2 * math.sqrt(repeats))
    assert not torch.equal(through(Bfloat16(), values, 0), through(Bfloat16(), values, 1))
    assert torch.equal(through(Bfloat16(), values, 3), through(Bfloat16(), values, 3))


def test_bf16_keeps_special_values() -> None:
    values = torch.tensor(SPECIAL[:5])
    assert torch.equal(bits(through(Bfloat16(), values[:4])), bits(values[:4]))
    assert through(Bfloat16(), values[4:]).isnan().all()
    largest = through(Bfloat16(), torch.tensor(SPECIAL[-2:]))
    assert (largest.abs() > 3.3e38).all() and largest[0] > 0 > largest[1]


def gaps(signed: bool) -> torch.Tensor:
    levels = dynamic_map(signed, torch.device("cpu"))
    return levels[1:] - levels[:-1]


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map(signed: bool) -> None:
    """256 levels, ascending; a decade has twice as many as the one below it (arXiv 2110.02861, section 1.3)."""
    levels = dynamic_map(signed, torch.device("cpu"))
    assert len(levels.unique()) == 256 and (gaps(signed) > 0).all()
    assert levels[-1] == 1 and levels[0] == pytest.approx(-1 + 0.9 / 128 if signed else 0)
    assert 0 in levels
    for decade in range(7):
        inside = (levels > 10.0 ** (decade - 7)) & (levels < 10.0 ** (decade - 6))
        assert inside.sum() == 2**decade * (1 if signed else 2)


@pytest.mark.parametrize("root", [False, True])
def test_blocks_are_off_by_half_a_gap_at_most(root: bool) -> None:
    """Of the ratio to the extreme of the block, which returns exactly but for the square of a root."""
    values = moments(5 * BLOCK + 100)
    values = values.abs() if root else values
    result = through(Blocks(root), values)
    kept, found = (values.sqrt(), result.sqrt()) if root else (values, result)
    half = gaps(not root).max() / 2
    for part, other in zip(kept.split(BLOCK), found.split(BLOCK), strict=True):
        extreme = part[part.abs().argmax()]
        # A ratio below -0.993, as the map has no -1, is off by up to the rest.
        assert ((part - other).abs() <= extreme.abs() * (1 - 0.9929 if not root else half) * 1.0001).all()
        at = part.abs().argmax()
        assert other[at] == pytest.approx(float(extreme), rel=2**-22 if root else 0)


def test_a_negative_extreme_returns_exactly() -> None:
    values = torch.linspace(-3.0, 1.0, BLOCK)
    assert through(Blocks(), values)[0] == -3.0


def test_a_second_moment_that_is_not_zero_stays_above_zero() -> None:
    """Adam divides by its root: zero beside a first moment that is not would throw the weight far away."""
    values = torch.full((BLOCK,), 1e-20)
    values[0], values[1] = 1.0, 0.0
    result = through(Blocks(root=True), values)
    assert (result[2:] > 0).all() and result[1] == 0


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
    values, cut = moments(PIECE + 4 * BLOCK + 40).abs(), 3 * BLOCK
    whole, first, rest = (stored_by(codec, n) for n in (len(values), cut, len(values) - cut))
    for stored, part, start in ((whole, values, 0), (first, values[:cut], 0), (rest, values[cut:], cut)):
        if isinstance(codec, Master):
            codec.encode(part, stored, torch.bfloat16)
        else:
            codec.encode(part, stored, 9, start)
    for plane, all_of_it, begin, end in zip(codec.planes, whole, first, rest, strict=True):
        assert torch.equal(plane.of(all_of_it, 0, cut), begin)
        assert torch.equal(plane.of(all_of_it, cut, len(values) - cut), end)
