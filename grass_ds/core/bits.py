# SPDX-License-Identifier: Apache-2.0
"""Numbers of one or two bits, several in a byte."""

import torch


def pack_bits(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Numbers below 2^width.

    Args:
        codes: uint8 [n]; may be overwritten.
        width: bits of each, a divisor of 8.

    Returns:
        uint8 [ceil(n width / 8)], the first number in the lowest bits.
    """
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % (8 // width))).view(-1, 8 // width)
    return codes.bitwise_left_shift_(_shifts(codes, width)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, numel: int, width: int) -> torch.Tensor:
    """The ``numel`` numbers that :func:`pack_bits` put into ``packed``: uint8 [numel]."""
    codes = packed.unsqueeze(1).bitwise_right_shift(_shifts(packed, width)).bitwise_and_(2**width - 1)
    return codes.view(-1)[:numel]


def _shifts(like: torch.Tensor, width: int) -> torch.Tensor:
    return torch.arange(0, 8, width, dtype=torch.uint8, device=like.device)
