# SPDX-License-Identifier: Apache-2.0
"""Low-precision weights that move without their fp32 master weights."""

import torch

EXPONENT, MAGNITUDE = 0x7F800000, 0x7FFFFFFF  # bits of a float32
# Bits that a float32 has and the dtype lacks.
DROPPED = {torch.bfloat16: 16, torch.float16: 13}


def add_rounded_stochastically(weights: torch.Tensor, change: torch.Tensor, generator: torch.Generator) -> None:
    """Add ``change`` (float32) to ``weights`` in place, without a bias by rounding.

    A change far below the precision of ``weights`` would be lost in every step if it were rounded to the nearest. Here
    it is rounded up with the probability that makes the mean exact, else down. float32 weights are rounded as ever.

    Args:
        weights: [n]; ``change``: float32 [n].
        generator: on the device of ``weights``; equal states give equal results.
    """
    exact = weights.to(torch.float32).add_(change)
    if weights.dtype == torch.float32:
        weights.copy_(exact)
        return
    if weights.dtype == torch.bfloat16:  # the upper half of a float32: a random lower half carries into it
        bits = exact.view(torch.int32)
        bits.add_(_random_halves(len(bits), generator)).add_(2**15)  # 0 to 2^16 - 1
        weights.view(torch.int16).copy_(bits.bitwise_right_shift_(16))
        return
    limits, least = torch.finfo(weights.dtype), torch.finfo(torch.float32).tiny
    # Of the dtype around each element. Devices may take float32 below its smallest normal number for zero.
    spacing = exact.abs().clamp_min_(max(limits.smallest_normal, least / limits.eps))
    spacing.view(torch.int32).bitwise_and_(EXPONENT)
    spacing.mul_(limits.eps)
    fraction = exact.div_(spacing)
    below = fraction.floor()
    fraction.sub_(below)
    below.add_(torch.rand(below.shape, generator=generator, device=below.device) < fraction)
    weights.copy_(below.mul_(spacing))


def _random_halves(numel: int, generator: torch.Generator) -> torch.Tensor:
    """Random int16 [numel], all values alike: four of a draw, which is what takes the time."""
    draws = torch.empty(-(-numel // 4), dtype=torch.int64, device=generator.device)
    return draws.random_(-(2**63), None, generator=generator).view(torch.int16)[:numel]


def follow(master: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The master weights after ``weights``, which were ``master`` rounded to their dtype, have changed.

    They keep what rounding had cut off, counted in steps of float32: rounded to the dtype again, the result is
    ``weights``, whatever happened in between. So it does not matter how often this is done.

    Args:
        master: float32; ``weights``: of equal shape, on the same device.

    Returns:
        float32, new memory.
    """
    most = 2 ** (DROPPED.get(weights.dtype, 1) - 1) - 1  # half a step of the dtype would be a tie
    return restored(weights, cut_off(master, master.to(weights.dtype)).clamp_(-most, most))


def cut_off(master: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """What rounding has cut off ``master`` (float32), in steps of float32: int32, new memory."""
    return _ordinals(master).sub_(_ordinals(rounded))


def restored(rounded: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
    """The float32 numbers ``cut`` (int32) steps above ``rounded``, new memory: the inverse of :func:`cut_off`.

    Where nothing was cut off it is ``rounded``, also a zero with its sign.
    """
    return torch.where(cut == 0, rounded.to(torch.float32), _from_ordinals(_ordinals(rounded).add_(cut)))


# Random signs make a choice between two tensors take ten times as long on a CPU as this arithmetic. ``sign`` is 0 or -1.


def _ordinals(values: torch.Tensor) -> torch.Tensor:
    """Position of the values among all float32 numbers, as int32, new memory: 0 is 0, neighbours differ by 1."""
    bits = values.to(torch.float32, copy=True).view(torch.int32)
    sign = bits >> 31
    return bits.bitwise_and_(MAGNITUDE).bitwise_xor_(sign).sub_(sign)


def _from_ordinals(ordinals: torch.Tensor) -> torch.Tensor:
    """The inverse, in place."""
    sign = ordinals >> 31
    return ordinals.bitwise_xor_(sign).sub_(sign).bitwise_or_(sign << 31).view(torch.float32)
