# SPDX-License-Identifier: Apache-2.0
"""How one fp32 tensor of optimizer state is kept between steps: pure functions of tensors.

[Note: Exact master weights] A bf16 weight is its fp32 master weight, rounded. What rounding cuts off is at most 2^15
steps of fp32 in either direction, ties included: one value more than 16 bits have. A bitmap tells the two ties apart,
so that master weights take 2.125 bytes instead of 4, and every bit of them returns.

[Note: Blocks] 256 elements share a scale, the one of largest magnitude, with its sign: it is kept exactly, so that
encoding again what was decoded changes nothing. The others are the nearest of 256 multiples of the scale, which are
denser near zero: the dynamic map of 8-bit optimizers (arXiv 2110.02861). torchao has it in pure torch, too, but in a
private module, and its scale has no sign, so that encoding again moves blocks whose extreme is negative.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from grass_ds.core.bits import pack_bits, unpack_bits
from grass_ds.core.rounding import cut_off, follow, restored

BLOCK = 256  # elements that share a scale
PIECE = 2**20  # elements that are converted at a time, a multiple of BLOCK: bounds the memory that it takes
_WORD = 2**32 - 1
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
    """bf16, rounded stochastically: a decaying average changes by less than bf16 resolves, and would stand still."""

    planes = (Plane(torch.bfloat16),)

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], seed: int, start: int = 0) -> None:
        """Away from zero with the probability that makes the mean exact; infinite values and NaN stay."""
        for part, target in zip(values.split(PIECE), stored[0].split(PIECE), strict=True):
            noise = _random16(seed, start, len(part), values.device)
            start += len(part)
            high = noise.add_(part.view(torch.int32)).bitwise_right_shift_(16).to(torch.int16)
            target.copy_(torch.where(part.isfinite(), high.view(torch.bfloat16), part.to(torch.bfloat16)))

    def decode(self, stored: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        values.copy_(stored[0])


def _random16(seed: int, start: int, numel: int, device: torch.device) -> torch.Tensor:
    """Numbers below 2^16, int32: a hash of position and seed, so that they depend on nothing else.

    The hash is lowbias32 of C. Wellons ("Prospecting for Hash Functions"), here in int64 for want of uint32.
    """
    low, high = seed & _WORD, seed >> 32 & _WORD
    state = torch.arange(start, start + numel, device=device).mul_(0x9E3779B1).add_(low)
    for _ in range(2):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            state.bitwise_and_(_WORD)
            state.bitwise_xor_(state >> shift).mul_(factor)
        state.add_(high)
    return state.bitwise_and_(0xFFFF).to(torch.int32)


class Blocks(Codec):
    """Eight bits per element and an fp32 scale per block; a value that is not finite makes its block NaN.

    Args:
        root: for values that are never negative and span many magnitudes: the square root is kept, without a sign, and
            none but zero becomes zero. Adam divides by it.
    """

    planes = (Plane(torch.uint8), Plane(torch.float32, BLOCK))

    def __init__(self, root: bool = False):
        self._root = root

    def encode(self, values: torch.Tensor, stored: Sequence[torch.Tensor], seed: int, start: int = 0) -> None:
        levels = dynamic_map(not self._root, values.device)
        middles = (levels[1:] + levels[:-1]) / 2
        for part, codes, scales in zip(
            values.split(PIECE), stored[0].split(PIECE), stored[1].split(PIECE // BLOCK), strict=True
        ):
            blocks = torch.nn.functional.pad(part, (0, -len(part) % BLOCK)).reshape(-1, BLOCK)
            blocks = blocks.sqrt() if self._root else blocks
            least, most = blocks.aminmax(dim=1)
            scale = torch.where(most >= -least, most, least)
            ratios = blocks / torch.where(scale == 0, 1.0, scale).unsqueeze(1)
            found = torch.bucketize(ratios, middles, out_int32=True)
            if self._root:
                found.clamp_min_(1).mul_(blocks != 0)
            codes.copy_(found.view(-1)[: len(part)])
            scales.copy_(torch.where(scale.isfinite(), scale, torch.nan))

    def decode(self, stored: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        levels = dynamic_map(not self._root, values.device)
        for part, codes, scales in zip(
            values.split(PIECE), stored[0].split(PIECE), stored[1].split(PIECE // BLOCK), strict=True
        ):
            part.copy_(levels.index_select(0, codes.to(torch.int32)))
            part.mul_(scales.repeat_interleave(BLOCK)[: len(part)])
            if self._root:
                part.square_()


@cache
def dynamic_map(signed: bool, device: torch.device) -> torch.Tensor:
    """The 256 multiples of a scale, float32, ascending; the largest is 1, and the smallest -0.993 or 0.

    A decade has twice as many as the one below it: 2^i or, without sign, 2^(i + 1) in decade i of seven.
    """
    levels = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float64)
        middles = (10.0 ** (decade - 6) * (bounds[1:] + bounds[:-1]) / 2).tolist()
        levels += middles + ([-level for level in middles] if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


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
        for part, low, above in zip(
            master.split(PIECE), stored[0].split(PIECE), stored[1].split(PIECE // 8), strict=True
        ):
            cut = cut_off(part, part.to(dtype)).clamp_(-_TIE, _TIE)  # NaN may exceed it
            tie = cut == _TIE
            low.copy_(cut.masked_fill_(tie, -_TIE))
            above.copy_(pack_bits(tie.to(torch.uint8), 1))

    def decode(self, stored: Sequence[torch.Tensor], weights: torch.Tensor, moved: bool, master: torch.Tensor) -> None:
        parts = (master.split(PIECE), weights.split(PIECE), stored[0].split(PIECE), stored[1].split(PIECE // 8))
        for part, rounded, low, above in zip(*parts, strict=True):
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
