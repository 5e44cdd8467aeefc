# SPDX-License-Identifier: Apache-2.0
"""Packed signs come back as they went in."""

import pytest
import torch

from grass_ds.core.signs import pack_signs, unpack_signs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 4, 1023])
def test_signs_take_two_bits_and_are_kept(dtype: torch.dtype, numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    values[0] = 0
    packed = pack_signs(values)
    assert (packed.dtype, packed.shape) == (torch.uint8, (-(-numel // 4),))
    assert torch.equal(unpack_signs(packed, numel), values.float().sign())
    assert torch.equal(pack_signs(-values), pack_signs(-values.sign()))
