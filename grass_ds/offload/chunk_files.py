# SPDX-License-Identifier: Apache-2.0
"""Chunks in state files: a file is the planes of a unit, each padded to the alignment of direct I/O."""

import zlib
from collections.abc import Sequence

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.block_io import BlockIO, Piece
from grass_ds.offload.chunks import ELEMENT, Chunk, round_up
from grass_ds.offload.state_files import OffloadError, StateFiles
from grass_ds.offload.tier import Planes
from grass_ds.offload.trace import Trace


def file_bytes(unit: Unit, planes: int) -> int:
    return planes * round_up(unit.shard_numel) * ELEMENT


class ChunkFiles:
    """Reads and writes chunks; one thread may read while another one writes another chunk.

    ``checksum``: keep a CRC-32 of every chunk that is written, and compare it when the chunk is read.
    """

    def __init__(self, files: StateFiles, reader: BlockIO, writer: BlockIO, checksum: bool, trace: Trace):
        self._files, self._reader, self._writer = files, reader, writer
        self._checksum, self._trace = checksum, trace
        self._checksums: dict[Chunk, int] = {}

    @property
    def nbytes(self) -> int:
        return self._files.nbytes

    def add(self, unit: Unit, planes: int) -> None:
        """Make the unit's file, unless there is one."""
        self._files.add(unit.name, file_bytes(unit, planes))

    def read(self, chunk: Chunk, planes: Planes) -> None:
        """Raises :class:`OffloadError` if the checksum is not that of what was written."""
        file = self._files[chunk.unit.name]
        with self._trace.span("read", str(chunk)):
            self._reader.read(file, pieces_of(chunk, planes))
        written = self._checksums.get(chunk)
        if written is not None and written != _crc32(chunk, planes):
            raise OffloadError(
                f"checksum mismatch: {file.path} does not hold what was written there for {chunk}. The disk or its "
                "file system lost or changed data; load the last checkpoint, with another grass.offload.nvme_path or "
                "offload.device: cpu"
            )

    def write(self, chunk: Chunk, planes: Planes) -> None:
        if self._checksum:
            self._checksums[chunk] = _crc32(chunk, planes)
        with self._trace.span("write", str(chunk)):
            self._writer.write(self._files[chunk.unit.name], pieces_of(chunk, planes))


def pieces_of(chunk: Chunk, planes: Sequence[torch.Tensor]) -> list[Piece]:
    """Whole pages of memory, and where they are in the unit's file."""
    numel, plane_bytes = round_up(chunk.numel), file_bytes(chunk.unit, 1)
    return [
        Piece(plane.narrow(0, 0, numel), index * plane_bytes + chunk.start * ELEMENT)
        for index, plane in enumerate(planes)
    ]


def _crc32(chunk: Chunk, planes: Planes) -> int:
    value = 0
    for plane in planes:
        value = zlib.crc32(memoryview(plane[: chunk.numel].numpy()).cast("B"), value)
    return value
