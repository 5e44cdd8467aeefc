# SPDX-License-Identifier: Apache-2.0
"""Chunks in state files: a file is the planes of a unit, each chunk of them padded to the alignment of direct I/O."""

import itertools
import zlib
from collections.abc import Sequence

import torch

from grass_ds.core.units import Unit
from grass_ds.offload.block_io import BlockIO, Piece
from grass_ds.offload.chunks import Chunk, StateLayout, page_bytes
from grass_ds.offload.state_files import OffloadError, StateFiles
from grass_ds.offload.tier import Planes
from grass_ds.offload.trace import Trace


def file_bytes(unit: Unit, layout: StateLayout) -> int:
    return sum(_bytes_of_planes(unit, layout))


def _bytes_of_planes(unit: Unit, layout: StateLayout) -> list[int]:
    chunks = layout.chunks(unit)
    return [sum(page_bytes(plane, chunk.numel) for chunk in chunks) for plane in layout.planes_of(unit)]


class ChunkFiles:
    """Reads and writes chunks; one thread may read while another one writes another chunk.

    ``checksum``: keep a CRC-32 of every chunk that is written, and compare it when the chunk is read.
    """

    def __init__(
        self, files: StateFiles, layout: StateLayout, reader: BlockIO, writer: BlockIO, checksum: bool, trace: Trace
    ):
        self._files, self._layout, self._reader, self._writer = files, layout, reader, writer
        self._checksum, self._trace = checksum, trace
        self._checksums: dict[Chunk, int] = {}

    @property
    def nbytes(self) -> int:
        return self._files.nbytes

    def add(self, unit: Unit) -> None:
        """Make the unit's file, unless there is one."""
        self._files.add(unit.name, file_bytes(unit, self._layout))

    def read(self, chunk: Chunk, memory: Planes) -> None:
        """Read into whole pages of host memory, uint8, one piece per plane.

        Raises:
            OffloadError: the checksum is not that of what was written.
        """
        file = self._files[chunk.unit.name]
        with self._trace.span("read", str(chunk)):
            self._reader.read(file, pieces_of(chunk, self._layout, memory))
        written = self._checksums.get(chunk)
        if written is not None and written != self._crc32(chunk, memory):
            raise OffloadError(
                f"checksum mismatch: {file.path} does not hold what was written there for {chunk}. The disk or its "
                "file system lost or changed data; load the last checkpoint, with another grass.offload.nvme_path or "
                "offload.device: cpu"
            )

    def write(self, chunk: Chunk, memory: Planes) -> None:
        if self._checksum:
            self._checksums[chunk] = self._crc32(chunk, memory)
        with self._trace.span("write", str(chunk)):
            self._writer.write(self._files[chunk.unit.name], pieces_of(chunk, self._layout, memory))

    def _crc32(self, chunk: Chunk, memory: Planes) -> int:
        value = 0
        for plane in self._layout.views(chunk, memory):
            value = zlib.crc32(memoryview(plane.view(torch.uint8).numpy()), value)
        return value


def pieces_of(chunk: Chunk, layout: StateLayout, memory: Sequence[torch.Tensor]) -> list[Piece]:
    """Whole pages of memory (uint8, one piece per plane), and where they are in the unit's file."""
    planes, sizes = layout.planes_of(chunk.unit), _bytes_of_planes(chunk.unit, layout)
    before = chunk.start // layout.chunk_numel
    return [
        Piece(piece[: page_bytes(plane, chunk.numel)], start + before * page_bytes(plane, layout.chunk_numel))
        for plane, piece, start in zip(planes, memory, itertools.accumulate(sizes, initial=0), strict=False)
    ]
