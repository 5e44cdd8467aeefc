# SPDX-License-Identifier: Apache-2.0
"""Build the state store that the ``offload`` block asks for."""

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from deepspeed.utils import logger

from grass_ds.config import OffloadConfig
from grass_ds.core.units import Unit
from grass_ds.offload.block_io import open_io
from grass_ds.offload.chunk_files import ChunkFiles, file_bytes
from grass_ds.offload.chunks import GRAIN, StateLayout, round_up
from grass_ds.offload.copies import Copies, copies_for
from grass_ds.offload.device_buffers import DeviceBuffers
from grass_ds.offload.host import HostTier
from grass_ds.offload.nvme import SPARE_BUFFERS, NvmeTier
from grass_ds.offload.pinned_memory import HostMemory
from grass_ds.offload.state_files import StateFiles, resolve_path
from grass_ds.offload.state_format import StateFormat, choose_format
from grass_ds.offload.state_template import StateTemplate
from grass_ds.offload.store import StateStore
from grass_ds.offload.tier import Tier
from grass_ds.offload.trace import Trace

DEFAULT_HOST_BYTES = 4 * 2**30
"""Host buffers of ``nvme`` take at most this by default."""


def open_store(
    config: OffloadConfig,
    units: Sequence[Unit],
    templates: Sequence[StateTemplate],
    *,
    num_active_layers: int,
    largest_share: float = 1.0,
    device: torch.device,
    rank: int,
    aio: Mapping[str, Any],
) -> StateStore:
    """The state store of this rank; takes disk space and host buffers, if any, and nothing on the device.

    Args:
        templates: what the optimizer keeps, per param group.
        num_active_layers, largest_share: see :meth:`StateLayout.largest_active_set`.
        rank: of this process in the whole job.
        aio: DeepSpeed's ``"aio"`` block.

    Raises:
        GrassConfigError: the disk cannot be used, or the state format does not fit the weights.
    """
    copies = copies_for(device, Trace(config.trace, rank))
    keys = {(unit.group, unit.dtype) for unit in units}
    formats = {(g, dtype): choose_format(config.state_format, templates[g].moments, dtype) for g, dtype in keys}
    layout = state_layout(config, units, formats)
    tier = Tier()
    if config.device == "cpu":
        tier = HostTier(copies, layout, config.pin_memory)
    elif config.device == "nvme":
        count = count_host_buffers(config, layout, units, num_active_layers, largest_share)
        tier = _open_nvme(config, layout, units, count, copies, rank, aio)
    buffers = DeviceBuffers(tier, copies, device, layout, config)
    return StateStore(tier, buffers, templates, formats, layout, device, copies.trace)


def _open_nvme(
    config: OffloadConfig,
    layout: StateLayout,
    units: Sequence[Unit],
    count: int,
    copies: Copies,
    rank: int,
    aio: Mapping[str, Any],
) -> NvmeTier:
    """The NVMe tier with ``count`` host buffers. If a part cannot be made, the others are closed."""
    sizes = {unit.name: file_bytes(unit, layout) for unit in units if unit.ever_active}
    with ExitStack() as resources:
        path = resolve_path(str(config.nvme_path))
        files = resources.enter_context(closing(StateFiles(path, rank, _job(), sizes)))
        memory = HostMemory(count * layout.buffer_bytes, config.pin_memory, lock=config.io != "posix")
        resources.enter_context(closing(memory))
        open_direction = open_io(config.io, aio, files.direct, memory.locked)
        reader, writer = (resources.enter_context(closing(open_direction())) for _ in ("read", "write"))
        chunk_files = ChunkFiles(files, layout, reader, writer, config.checksum, copies.trace)
        tier = NvmeTier(chunk_files, memory.data, count, copies, layout, resources)
    if rank == 0:
        logger.info(
            f"grass_ds: optimizer state in {config.nvme_path}: {tier.nvme_bytes / 1e9:.2f} GB of files and "
            f"{count} host buffers of {layout.buffer_bytes / 1e6:.1f} MB per rank"
        )
    return tier


def state_layout(
    config: OffloadConfig, units: Sequence[Unit], formats: Mapping[tuple[int, torch.dtype], StateFormat]
) -> StateLayout:
    """How the states of the units, in the formats of their param group and dtype, are divided."""
    return StateLayout({key: format.planes for key, format in formats.items()}, _chunk_numel(config, units))


def _chunk_numel(config: OffloadConfig, units: Sequence[Unit]) -> int:
    """A multiple of :data:`GRAIN`, at most the largest shard that can ever train.

    ``none``: one chunk per unit, unless a chunk is decoded to be stepped, which takes memory of its own.
    """
    if config.device == "none" and config.state_format == "fp32":
        return round_up(max(unit.shard_numel for unit in units))
    largest = max((unit.shard_numel for unit in units if unit.ever_active), default=GRAIN)
    return round_up(min(config.chunk_numel, largest))


def count_host_buffers(
    config: OffloadConfig, layout: StateLayout, units: Sequence[Unit], num_active_layers: int, share: float = 1.0
) -> int:
    """Host buffers of ``nvme``, each of :attr:`StateLayout.buffer_bytes`; see :func:`open_store`."""
    if config.host_buffers is not None:
        return config.host_buffers
    least = config.device_buffers + SPARE_BUFFERS
    if config.residency == "period":
        return max(least, 4)
    wanted = layout.largest_active_set(units, num_active_layers, share) + SPARE_BUFFERS
    return max(least, min(wanted, DEFAULT_HOST_BYTES // layout.buffer_bytes))


def _job() -> str:
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name, "none") != "none":
            return f"{name}={os.environ[name]}"
    return f"started by process {os.getppid()} on {socket.gethostname()}"
