# SPDX-License-Identifier: Apache-2.0
"""Signs in two bits each: all that a sign step needs to know of a gradient."""

import torch

from grass_ds.core.bits import pack_bits, unpack_bits

PER_BYTE = 4


def pack_signs(values: torch.Tensor) -> torch.Tensor:
    """The signs (-1, 0 or 1) of ``values`` [n], any dtype.

    Returns:
        uint8 [ceil(n / 4)]: element i is in bits 2 (i % 4) and 2 (i % 4) + 1 of byte i // 4.
    """
    return pack_bits(values.sign().to(torch.int8).add_(1).view(torch.uint8), 2)  # 0, 1, 2


def unpack_signs(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The ``numel`` signs that :func:`pack_signs` put into ``packed``: float32 [numel]."""
    return unpack_bits(packed, numel, 2).to(torch.float32).sub_(1)
