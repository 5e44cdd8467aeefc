# SPDX-License-Identifier: Apache-2.0
"""Low-precision weights that move without their fp32 master weights."""

import torch

EXPONENT = 0x7F800000  # bits of a float32


def add_rounded_stochastically(weights: torch.Tensor, change: torch.Tensor, generator: torch.Generator) -> None:
    """Add ``change`` (float32) to ``weights`` in place, without a bias by rounding.

    A change far below the precision of ``weights`` would be lost in every step if it were rounded to the nearest. Here
    it is rounded up with the probability that makes the mean exact, else down. float32 weights are rounded as ever.

    Args:
        generator: on the device of ``weights``; equal states give equal results.
    """
    exact = weights.to(torch.float32).add_(change)
    if weights.dtype != torch.float32:
        limits = torch.finfo(weights.dtype)
        spacing = exact.abs().clamp_min_(limits.smallest_normal)
        spacing.view(torch.int32).bitwise_and_(EXPONENT)
        spacing.mul_(limits.eps)  # of the dtype around each element
        up = torch.rand(exact.shape, generator=generator, device=exact.device)
        exact.div_(spacing).add_(up).floor_().mul_(spacing)
    weights.copy_(exact)


def follow(master: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The master weights after ``weights``, which were ``master`` rounded to their dtype, have changed.

    They keep what rounding had cut off, counted in steps of float32: rounded to the dtype again, the result is
    ``weights``, whatever happened in between. So it does not matter how often this is done.

    Args:
        master: float32; ``weights``: of equal shape, on the same device.

    Returns:
        float32, new memory.
    """
    dropped = {torch.bfloat16: 16, torch.float16: 13}.get(
        weights.dtype, 1
    )  # bits that float32 has and the dtype lacks
    most = 2 ** (dropped - 1) - 1  # half a step of the dtype would be a tie; float32 keeps nothing
    cut_off = _bits(master).sub_(_bits(master.to(weights.dtype))).clamp_(-most, most)
    return _bits(weights).add_(cut_off).view(torch.float32)


def _bits(values: torch.Tensor) -> torch.Tensor:
    """Those of the values in float32, as int32, new memory: neighbours differ by 1."""
    return values.to(torch.float32, copy=True).view(torch.int32)
