# SPDX-License-Identifier: Apache-2.0
"""How one fp32 tensor of optimizer state is kept between steps: pure functions of tensors.

[Note: Exact master weights] A bf16 weight is its fp32 master weight, rounded. What rounding cuts off is at most 2^15
steps of fp32 in either direction, ties included: one value more than 16 bits have. A bitmap tells the two ties apart,
so that master weights take 2.125 bytes instead of 4, and every bit of them returns.

[Note: Blocks] 256 elements share a scale, the largest magnitude among them. Each is one of 256 multiples of the scale,
which are denser near zero: the dynamic map of 8-bit optimizers (arXiv 2110.02861), but for its outermost levels, which
are the scale itself here. So every element lies between two levels. torchao has the map in pure torch, too, but in a
private module, and rounds to the nearest.

[Note: Rounding of moments] A moment changes by less per step than its stored form resolves. Rounded to the nearest
it would stand still. So x becomes one of its two neighbours a <= x <= b at random: b with probability
(x - a) / (b - a), so that the mean of what is decoded is x. The random numbers are a hash of seed and position, the
same on every device.

[Note: Encoding again] What was decoded returns unchanged with any seed, as a checkpoint in fp32 requires. Let s be the
scale, L[j] level j, x = fl(L[j] s) what was decoded, r = fl(x / s), and i the last index with L[i] <= r. The
neighbours of x are a = fl(L[i] s) and b = fl(L[i + 1] s), computed as decoding does. Rounding keeps the order of
numbers.

- The scale returns: the element of magnitude s gives r = 1 or -1 exactly, which are levels, and fl(1 s) = s.
- If j > i, then b <= x. Since r < L[i + 1], x / s < L[i + 1], so x <= b. So x = b.
- If j <= i, then x <= a. If |x| is at least the smallest normal number, r differs from L[j] by less than one part in
  2^22, and levels by more; so j = i. Otherwise |x| is less than 2^23 units of the last place. Then r s, which differs
  from x by at most one part in 2^24, rounds to x; so a <= fl(r s) = x. In both cases x = a.

The probability of b is fl((x - a) / (b - a)), which is 1 if x = b and 0 if x = a; random numbers are in [0, 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from grass_ds.core.bits import pack_bits, unpack_bits
from grass_ds.core.rounding import cut_off, follow, restored

BLOCK = 256  # elements that share a scale
PIECE = 2**21  # elements that are converted at a time, a multiple of BLOCK: bounds the memory that it takes
CPU_PIECE = 2**18  # there an operation costs next to nothing to start, and a piece fits the cache
PIECE_BYTES = 24  # of temporary memory per element of a piece, at most, beside the scales of blocks
_TIE = 2**15  # of the steps of fp32 between two bf16 numbers


@dataclass(frozen=True)
class Plane:
    """One stored tensor; each of its elements is for ``per`` elements of the shard."""

    dtype: torch.dtype
    per: int = 1

    def numel(self, elements: int) -> int:
        return -(-elements // self.per)

    def nbytes(self, elements: int) -> int:
        return self.numel(elements) * self.dtype.itemsize

    def of(self, stored: torch.Tensor, start: int, elements: int) -> torch.Tensor:
        """The part for these elements of the shard, a view; ``start`` is a multiple of ``per``."""
        return stored.narrow(0, start // self.per, self.numel(elements))


Pieces = Iterator[tuple[int, torch.Tensor, list[torch.Tensor]]]


def pieces(values: torch.Tensor, planes: Sequence[Plane], stored: Sequence[torch.Tensor]) -> Pieces:
    """What is converted at a time: position of the first element, the values, and what is stored of them per plane."""
    assert [len(kept) for kept in stored] == [plane.numel(len(values)) for plane in planes]
    at = 0
    for part in values.split(CPU_PIECE if values.device.type == "cpu" else PIECE):
        yield at, part, [plane.of(kept, at, len(part)) for plane, kept in zip(planes, stored, strict=True)]
        at += len(part)


class Codec(ABC):
    """Between float32 values [n] and what is stored of them, one tensor per plane.

    Decoding, encoding and decoding again gives the same values.
    """

    planes: tuple[Plane, ...]

    @abstractmethod
    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], seed: int, start: int = 0) -> None:
        """Write ``values`` into ``stored``.

        Args:
            seed: of what is random in it.
            start: position of the first value in its shard, a multiple of ``BLOCK``. The shard is stored alike however
                it is cut.
        """

    @abstractmethod
    def decode(self, stored: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Write what is stored into ``values``."""


class Float32(Codec):
    """As it is."""

    planes = (Plane(torch.float32),)

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], seed: int, start: int = 0) -> None:
        stored[0].copy_(values)

    def decode(self, stored: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        if stored[0] is not values:  # in the plain format what is stored is the state itself
            values.copy_(stored[0])


class Bfloat16(Codec):
    """bf16, see [Note: Rounding of moments]."""

    planes = (Plane(torch.bfloat16),)

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], seed: int, start: int = 0) -> None:
        """Infinite values and NaN stay."""
        for at, part, (target,) in pieces(values, self.planes, stored):
            noise = random_bits(seed, start + at, len(part), 16, values.device)
            high = noise.add_(part.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16)
            target.copy_(torch.where(part.isfinite(), high.view(torch.bfloat16), part.to(torch.bfloat16)))

    def decode(self, stored: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        values.copy_(stored[0])


def random_bits(seed: int, start: int, numel: int, bits: int, device: torch.device) -> torch.Tensor:
    """Numbers below 2^bits for positions from ``start`` on, int32 [numel]: a hash of position and seed alone.

    The hash is lowbias32 of C. Wellons ("Prospecting for Hash Functions") on the lower half of the seed and the
    position; the upper half is added in its middle. It is integer arithmetic modulo 2^32, for which int32 will do, as
    torch's products and sums wrap around. Shifts are arithmetic there: a mask makes them logical.
    """
    state = torch.arange(numel, dtype=torch.int32, device=device).add_(_int32(start)).mul_(_int32(0x9E3779B1))
    state.add_(_int32(seed))
    shifted = torch.empty_like(state)
    for shift, factor, term in ((16, 0x7FEB352D, seed >> 32), (15, 0x846CA68B, 0), (16, 1, 0)):
        torch.bitwise_right_shift(state, shift, out=shifted)
        state.bitwise_xor_(shifted.bitwise_and_(2 ** (32 - shift) - 1))
        if factor != 1:
            state.mul_(_int32(factor)).add_(_int32(term))
    return state.bitwise_and_(2**bits - 1)


def _int32(number: int) -> int:
    """The int32 that is ``number`` modulo 2^32."""
    return (number + 2**31) % 2**32 - 2**31


class Blocks(Codec):
    """Eight bits per element and an fp32 scale per block, see [Note: Blocks] and [Note: Rounding of moments].

    A value that is not finite makes its block NaN.

    Args:
        root: for second moments, which are never negative and span many magnitudes: levels are the squares of the map
            without signs, so that the root has its resolution, while the mean is right of the second moment itself.
            None but zero becomes zero, as Adam divides by the root: a second moment below the lowest level, 1e-13 of
            the scale, becomes that level, the smallest mean that is possible then. A negative one makes its block NaN.
    """

    planes = (Plane(torch.uint8), Plane(torch.float32, BLOCK))

    def __init__(self, root: bool = False):
        self._root = root

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], seed: int, start: int = 0) -> None:
        for at, part, (codes, scales) in pieces(values, self.planes, stored):
            self._encode_piece(part, codes, scales, seed, start + at)

    def _encode_piece(
        self, part: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, seed: int, start: int
    ) -> None:
        levels = dynamic_map(self._root, part.device)
        blocks = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
        least, most = blocks.aminmax(dim=1)
        scale = torch.where(least < 0, torch.nan, most) if self._root else torch.maximum(most, -least)
        scales.copy_(torch.where(scale.isfinite(), scale, torch.nan))
        wide = scale.unsqueeze(1)
        lower = last_level_below((blocks / torch.where(wide == 0, 1.0, wide)).view(-1), self._root)
        below, above = (levels.index_select(0, at).view_as(blocks).mul_(wide) for at in (lower, lower + 1))
        chance = (blocks - below).div_(above.sub_(below))
        del above  # memory of a whole piece
        noise = random_bits(seed, start, blocks.numel(), 24, part.device).to(torch.float32).mul_(2.0**-24)
        up = noise.view_as(blocks) < chance
        if self._root:
            up.logical_or_(below == 0).logical_and_(blocks != 0)
        codes.copy_(lower.add_(up.view(-1))[: len(part)])

    def decode(self, stored: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        levels = dynamic_map(self._root, values.device)
        for _, part, (codes, scales) in pieces(values, self.planes, stored):
            part.copy_(levels.index_select(0, codes.to(torch.int32)))
            part.mul_(scales.repeat_interleave(BLOCK)[: len(part)])


@cache
def dynamic_map(root: bool, device: torch.device) -> torch.Tensor:
    """The multiples of a scale, float32, ascending: 255 from -1 to 1, or with ``root`` 256 squares from 0 to 1.

    A decade has twice as many as the one below it: 2^i of each sign or, with ``root``, 2^(i + 1) in decade i of seven.
    """
    levels = []
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade + root) + 1, dtype=torch.float64)
        levels += (10.0 ** (decade - 6) * (bounds[1:] + bounds[:-1]) / 2).tolist()
    levels = [0.0, *(level**2 for level in levels), 1.0] if root else [0.0, *levels[:-1], 1.0]
    signed = levels if root else [*(-level for level in levels[:0:-1]), *levels]
    return torch.tensor(signed, dtype=torch.float32, device=device)


def last_level_below(ratios: torch.Tensor, root: bool) -> torch.Tensor:
    """Index of the last level of the map that is at most the ratio, but of the last level but one at most.

    A binary search takes most of the time of encoding on a CPU. A table of the upper halves of float32 numbers, and a
    comparison, does as well: numbers that share the half differ by less than 0.8 %, neighbouring levels by more.

    Args:
        ratios: float32 [n], between the outermost levels; of NaN it is any index.

    Returns:
        int32 [n].
    """
    levels, halves = dynamic_map(root, ratios.device), ratios.view(torch.int32).bitwise_right_shift(16)
    lower = _table(root, ratios.device).index_select(0, halves.bitwise_and_(0xFFFF))
    return lower.add_(ratios >= levels.index_select(0, lower + 1)).clamp_max_(len(levels) - 2)


@cache
def _table(root: bool, device: torch.device) -> torch.Tensor:
    """For each upper half of a float32 number the index for the least number that has it: int32 [2^16]."""
    levels, halves = dynamic_map(root, device), torch.arange(2**16, dtype=torch.int32, device=device) << 16
    least = torch.minimum(halves.view(torch.float32), (halves | 0xFFFF).view(torch.float32))
    return torch.bucketize(least, levels, out_int32=True, right=True).sub_(1).clamp_(0, len(levels) - 2)


class Master(ABC):
    """As :class:`Codec`, for master weights: the low-precision weights [n] are there, too."""

    planes: tuple[Plane, ...]

    @abstractmethod
    def encode(self, master: torch.Tensor, stored: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        """Write what the weights of that dtype, ``master`` rounded, do not say."""

    @abstractmethod
    def decode(self, stored: Sequence[torch.Tensor], weights: torch.Tensor, moved: bool, master: torch.Tensor) -> None:
        """Write the master weights. ``moved``: ``weights`` have changed since, and the master weights follow them."""


class WholeMaster(Master):
    """All of it."""

    planes = (Plane(torch.float32),)

    def encode(self, master: torch.Tensor, stored: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        stored[0].copy_(master)

    def decode(self, stored: Sequence[torch.Tensor], weights: torch.Tensor, moved: bool, master: torch.Tensor) -> None:
        master.copy_(follow(stored[0], weights) if moved else stored[0])


class CutOff(Master):
    """What rounding to bf16 has cut off, see [Note: Exact master weights]."""

    planes = (Plane(torch.int16), Plane(torch.uint8, 8))

    def encode(self, master: torch.Tensor, stored: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        for _, part, (low, above) in pieces(master, self.planes, stored):
            cut = cut_off(part, part.to(dtype)).clamp_(-_TIE, _TIE)  # NaN may exceed it
            low.copy_(cut)  # 2^15 becomes -2^15
            above.copy_(pack_bits((cut == _TIE).to(torch.uint8), 1))

    def decode(self, stored: Sequence[torch.Tensor], weights: torch.Tensor, moved: bool, master: torch.Tensor) -> None:
        planes = (*self.planes, Plane(weights.dtype))
        for _, part, (low, above, rounded) in pieces(master, planes, (*stored, weights)):
            cut = low.to(torch.int32).add_(unpack_bits(above, len(part), 1).to(torch.int32).mul_(2 * _TIE))
            if moved:
                cut.clamp_(1 - _TIE, _TIE - 1)
            part.copy_(torch.where(rounded.isnan(), torch.nan, restored(rounded, cut)))


class NoMaster(Master):
    """Nothing: fp32 weights are their own master weights."""

    planes = ()

    def encode(self, master: torch.Tensor, stored: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
        pass

    def decode(self, stored: Sequence[torch.Tensor], weights: torch.Tensor, moved: bool, master: torch.Tensor) -> None:
        master.copy_(weights)
