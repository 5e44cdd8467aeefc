# SPDX-License-Identifier: Apache-2.0
"""Signs in two bits each: all that a sign step needs to know of a gradient."""

import torch

PER_BYTE = 4


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """The signs (-1, 0 or 1) of ``values`` [n], any dtype.

    Returns:
        uint8 [ceil(n / 4)]: element i is in bits 2 (i % 4) and 2 (i % 4) + 1 of byte i // 4.
    """
    codes = values.sign().to(torch.int8).add_(1).view(torch.uint8)  # 0, 1, 2
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % PER_BYTE)).view(-1, PER_BYTE)
    return codes.bitwise_left_shift_(_shifts(codes)).sum(1, dtype=torch.uint8)


def unpack_signs(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The ``numel`` signs that :func:`pack_signs` put into ``packed``: float32 [numel]."""
    codes = packed.unsqueeze(1).bitwise_right_shift(_shifts(packed)).bitwise_and_(3)
    return codes.view(-1)[:numel].to(torch.float32).sub_(1)


def _shifts(like: torch.Tensor) -> torch.Tensor:
    return torch.arange(0, 2 * PER_BYTE, 2, dtype=torch.uint8, device=like.device)
