# SPDX-License-Identifier: Apache-2.0
"""Where a chunk lies in its unit's file: master | moments, each plane aligned; and what was last written there."""

import zlib
from collections.abc import Sequence

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.block_io import Piece
from grass_ds.offload.chunks import ELEMENT, Chunk, round_up
from grass_ds.offload.state_files import OffloadError, StateFile


def file_bytes(unit: Unit, planes: int) -> int:
    """Size of a unit's file."""
    return planes * round_up(unit.shard_numel) * ELEMENT


def pieces(chunk: Chunk, planes: Sequence[torch.Tensor]) -> list[Piece]:
    """The chunk's part of every plane; its end is rounded up to the alignment, which buffer planes and file have room for."""
    numel, plane_bytes = round_up(chunk.numel), file_bytes(chunk.unit, 1)
    return [
        Piece(plane.narrow(0, 0, numel), index * plane_bytes + chunk.start * ELEMENT)
        for index, plane in enumerate(planes)
    ]


class Checksums:
    """CRC-32 of every chunk as it was last written, in memory."""

    def __init__(self) -> None:
        self._written: dict[Chunk, int] = {}

    def remember(self, chunk: Chunk, views: Sequence[torch.Tensor]) -> None:
        """``views`` are about to be written."""
        self._written[chunk] = _crc32(views)

    def verify(self, chunk: Chunk, views: Sequence[torch.Tensor], file: StateFile) -> None:
        """Raise :class:`OffloadError` if ``views``, as read, are not what was written."""
        if chunk in self._written and self._written[chunk] != _crc32(views):
            raise OffloadError(
                f"checksum mismatch: {file.path} does not hold what was written there for {chunk}. The disk or its file system "
                "lost or changed data; load the last checkpoint, with another grass.offload.nvme_path or offload.device: cpu"
            )


def _crc32(views: Sequence[torch.Tensor]) -> int:
    value = 0
    for view in views:
        value = zlib.crc32(memoryview(view.numpy()).cast("B"), value)
    return value
