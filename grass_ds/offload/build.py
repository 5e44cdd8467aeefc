# SPDX-License-Identifier: Apache-2.0
"""Put the parts of the offload scheduler together, as the ``offload`` block asks."""

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from deepspeed.utils import logger

from grass_ds.config import OffloadConfig
from grass_ds.core.units import Unit
from grass_ds.offload.block_io import open_io
from grass_ds.offload.chunks import ELEMENT, effective_chunk_numel, largest_active_set
from grass_ds.offload.copies import Copies, copies_for
from grass_ds.offload.device_buffers import Window
from grass_ds.offload.host import HostTier
from grass_ds.offload.layout import file_bytes
from grass_ds.offload.nvme import SPARE_BUFFERS, NvmeTier
from grass_ds.offload.pinned_memory import StagingMemory
from grass_ds.offload.state_files import StateFiles, resolve_path
from grass_ds.offload.state_template import StateTemplate
from grass_ds.offload.store import StateStore
from grass_ds.offload.tier import Tier
from grass_ds.offload.trace import Trace

DEFAULT_HOST_BYTES = 4 * 2**30
"""Host buffers of ``nvme`` take no more than this unless asked to."""


@dataclass(frozen=True)
class Surroundings:
    """What the store has to know of the run.

    Attributes:
        num_active_layers: gamma.
        device: of the model.
        rank: of this process in the whole job; its files are named by it.
        aio: DeepSpeed's ``"aio"`` block.
    """

    num_active_layers: int
    device: torch.device
    rank: int
    aio: Mapping[str, Any]


def open_store(
    config: OffloadConfig, units: Sequence[Unit], templates: Sequence[StateTemplate], surroundings: Surroundings
) -> StateStore:
    """The state store of this rank; takes disk space and host buffers, if any, and nothing on the device.

    Raises:
        GrassConfigError: the disk cannot be used, see :class:`~grass_ds.offload.state_files.StateFiles`.
    """
    trace = Trace(config.trace, surroundings.rank)
    copies = copies_for(surroundings.device, trace)
    chunk_numel = effective_chunk_numel(config.chunk_numel, units)
    eager = config.prefetch == "backward"

    def planes_of(unit: Unit) -> int:
        return templates[unit.group].planes

    max_planes = max(template.planes for template in templates)
    tier: Tier | None = None
    if config.device == "cpu":
        tier = HostTier(copies, config.pin_memory)
    elif config.device == "nvme":
        buffer_bytes = chunk_numel * max_planes * ELEMENT
        count = _host_buffers(config, surroundings.num_active_layers, units, chunk_numel, buffer_bytes)
        make = partial(NvmeTier, planes_of=planes_of, max_planes=max_planes, chunk_numel=chunk_numel)
        sizes = {unit.name: file_bytes(unit, planes_of(unit)) for unit in units if unit.ever_active}
        tier = _open_nvme(config, surroundings, copies, trace, sizes, count, buffer_bytes, make)
    window = Window(
        tier,
        copies,
        surroundings.device,
        planes_of=planes_of,
        max_planes=max_planes,
        residency="none" if tier is None else config.residency,
        buffers=config.device_buffers,
        chunk_numel=chunk_numel,
        eager=eager,
    )
    return StateStore(tier, window, templates, chunk_numel=chunk_numel, eager=eager, trace=trace)


def _open_nvme(
    config: OffloadConfig,
    surroundings: Surroundings,
    copies: Copies,
    trace: Trace,
    sizes: Mapping[str, int],
    buffers: int,
    buffer_bytes: int,
    make: Callable[..., NvmeTier],
) -> NvmeTier:
    """Files first: they are what fails; what was made before a failure is released."""
    with ExitStack() as undo:
        files = StateFiles(resolve_path(str(config.nvme_path)), surroundings.rank, _job(), sizes)
        undo.callback(files.close)
        memory = StagingMemory(buffers, buffer_bytes, pin=config.pin_memory, lock=config.io != "posix")
        undo.callback(memory.close)
        open_one = open_io(config.io, surroundings.aio, files.direct, memory.locked)
        tier = make(files, open_one, memory, copies, trace, checksum=config.checksum)
        undo.pop_all()
    if surroundings.rank == 0:
        logger.info(
            f"grass_ds: optimizer state in {config.nvme_path}: {files.nbytes / 1e9:.2f} GB of files and {buffers} host buffers of "
            f"{buffer_bytes / 1e6:.1f} MB per rank"
        )
    return tier


def _host_buffers(
    config: OffloadConfig, num_active_layers: int, units: Sequence[Unit], chunk_numel: int, buffer_bytes: int
) -> int:
    """``host_buffers``, or what suits."""
    least = config.device_buffers + SPARE_BUFFERS
    if config.host_buffers is not None:
        return config.host_buffers
    if config.residency == "period":
        return max(least, 4)
    wanted = largest_active_set(units, num_active_layers, chunk_numel) + SPARE_BUFFERS
    return max(least, min(wanted, DEFAULT_HOST_BYTES // buffer_bytes))


def _job() -> str:
    """What this job is called, for whoever finds its files."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name, "none") != "none":
            return f"{name}={os.environ[name]}"
    return f"started by process {os.getppid()} on {socket.gethostname()}"
