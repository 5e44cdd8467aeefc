# SPDX-License-Identifier: Apache-2.0
"""The rank of this process and the address of rank 0, read from the environment that the launcher left.

[Note: Placement] DeepSpeed, accelerate and torch read ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and
``MASTER_PORT``. torchrun, ``accelerate launch`` and DeepSpeed's launcher set them; ``srun`` and ``mpirun`` set
variables of their own; without a launcher there are none. :func:`find` reads all of them and :meth:`Placement.export`
translates. Contradictions are an error: ``srun -n 2 torchrun --standalone`` would train two models into one folder.
"""

import functools
import os
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from grass_ds.cluster.environment import Environment, PlacementError

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")
_GLOO_RELEASE_SECONDS = 0.25


@dataclass(frozen=True)
class Placement:
    """One process among the ranks of a run: the variables of :meth:`export`, and its launcher.

    Attributes:
        local_rank: rank among those of this machine.
        local_world_size: number of ranks on this machine, None if unknown.
        master_addr, master_port: host of rank 0, and the TCP port there at which ranks meet.
        launcher: "torchrun" (also ``accelerate launch``), "deepspeed", "srun", "mpirun", "environment" (the variables
            alone) or "none" (one process).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    launcher: str

    def device_index(self, visible: int) -> int:
        """The index of this rank's device among the ``visible`` ones: 0 where each task sees one of its own.

        Raises:
            PlacementError: no device is visible, or one launcher has started more ranks here than there are devices.
        """
        if self.launcher in ("srun", "mpirun") and visible:  # which start each rank in an environment of its own
            return self.local_rank % visible
        if self.local_rank >= visible:
            raise PlacementError(
                f"local rank {self.local_rank} has no device: {visible} visible on {socket.gethostname()}, "
                f"{self.local_world_size} ranks there (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); start at "
                f"most {visible} per machine (torchrun --nproc-per-node, deepspeed --num_gpus), or show more devices"
            )
        return self.local_rank

    def export(self) -> None:
        """Set the variables that torch, DeepSpeed and accelerate read, for this process and its children.

        They use ``LOCAL_RANK`` as the index of the device, so that is its value where each task sees a single device.
        :func:`find` in this process still returns the local rank. :class:`PlacementError` if this rank has no device.
        """
        accelerator = get_accelerator()
        cpu = accelerator.device_name() == "cpu"
        index = self.local_rank if cpu else self.device_index(accelerator.device_count())
        variables = {**vars(self), "local_rank": index, "launcher": None}
        os.environ.update({name.upper(): str(value) for name, value in variables.items() if value is not None})
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed demands that both be equal
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
        _exported.append(self)


_exported: list[Placement] = []


def exported() -> Placement | None:
    """The placement that this process exported last."""
    return _exported[-1] if _exported else None


def find(environ: Mapping[str, str] | None = None) -> Placement:
    """The placement of this process: see [Note: Placement].

    Under ``mpirun`` all ranks have to call it, since they exchange the address of rank 0; otherwise it only reads the
    environment.

    Raises:
        PlacementError: the variables contradict each other, or one is missing.
    """
    if environ is None and (placement := exported()) is not None:
        return placement
    found = Environment(os.environ if environ is None else environ)
    if found.has("RANK"):
        return _from_variables(found)
    if _under_mpirun(found):
        return _from_mpi(found)
    if found.has("SLURM_STEP_ID"):
        return _from_slurm(found)
    if found.integer("WORLD_SIZE", default=1) > 1:
        return _from_variables(found)  # raises, naming what is missing
    if found.integer("SLURM_NTASKS", default=1) > 1:
        raise found.error(
            f"this SLURM job has {found.text('SLURM_NTASKS')} tasks, but the program was started without srun and would "
            "run once; put srun before it (or torchrun, deepspeed, mpirun), or set SLURM_NTASKS=1 for a single process"
        )
    return Placement(0, 0, 1, 1, "127.0.0.1", _free_port(), "none")


def leave_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo needs the interpreter to release what it sent, a moment later; without it the process aborts.
        time.sleep(_GLOO_RELEASE_SECONDS)


def _from_variables(found: Environment) -> Placement:
    rank, world = found.integer("RANK"), found.integer("WORLD_SIZE")
    if rank >= world:
        raise found.error(f"RANK={rank} must be below WORLD_SIZE={world}")
    mpi = found.integer_or_none("OMPI_COMM_WORLD_RANK"), found.integer_or_none("OMPI_COMM_WORLD_SIZE")
    if None not in mpi and mpi != (rank, world):
        raise found.error(
            f"RANK={rank} of WORLD_SIZE={world}, but mpirun calls this process {mpi[0]} of {mpi[1]}; unset RANK, "
            "LOCAL_RANK and WORLD_SIZE before mpirun, or start another launcher without mpirun"
        )
    if found.has("SLURM_STEP_ID") and not _under_mpirun(found):
        slurm = _from_slurm(found, check_world=False)
        if _started_by_srun(found, rank, world, slurm):
            return slurm
    alone = world == 1
    local_rank = found.integer("LOCAL_RANK", default=0 if alone else None)
    local_world = found.integer_or_none("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
    if local_world is not None and local_rank >= local_world:
        raise found.error(f"LOCAL_RANK={local_rank} must be below the number of ranks on this machine, {local_world}")
    address = found.text("MASTER_ADDR", default="127.0.0.1" if alone else None)
    port = found.integer("MASTER_PORT", default=_free_port() if alone else None)
    variable = {"TORCHELASTIC_RUN_ID": "torchrun", "CROSS_SIZE": "deepspeed"}
    launcher = next((launcher for name, launcher in variable.items() if found.has(name)), "environment")
    return Placement(rank, local_rank, world, 1 if alone else local_world, address, port, launcher)


def _started_by_srun(found: Environment, rank: int, world: int, slurm: Placement) -> bool:
    """Whether srun started each rank, so that its variables are complete. Else it started launchers or a shell."""
    if slurm.world_size == 1:
        return False  # a step of one task does not know other steps, nor the processes that were started in it
    agents = found.integer_or_none("GROUP_WORLD_SIZE", "CROSS_SIZE")
    if agents not in (None, slurm.world_size):
        raise found.error(
            f"srun started {slurm.world_size} tasks, but the launcher in them counts {agents} machines; start torchrun "
            "or deepspeed once per machine (srun --ntasks-per-node=1) and tell it of all of them (torchrun --nnodes=$SLURM_NNODES "
            "--rdzv-endpoint=...)"
        )
    if agents is None and (slurm.rank, slurm.world_size) != (rank, world):
        raise found.error(
            f"RANK={rank} of WORLD_SIZE={world}, but srun calls this process {slurm.rank} of {slurm.world_size}; sbatch "
            "carries the variables of the shell into the job: unset RANK, LOCAL_RANK, WORLD_SIZE before it"
        )
    return agents is None


def _from_slurm(found: Environment, check_world: bool = True) -> Placement:
    world = found.integer("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if check_world and (expected := found.integer("WORLD_SIZE", default=world)) != world:
        raise found.error(
            f"WORLD_SIZE={expected}, but srun started {world} tasks; unset it, or correct srun's --ntasks"
        )
    nodes = found.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    per_node = _tasks_per_node(found.text("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", default=""))
    master = found.text("MASTER_ADDR", default=first_host(nodes))
    if len(per_node) > 1 and (master == "localhost" or master.startswith("127.")):
        raise found.error(
            f"MASTER_ADDR={master} means another machine on each of {nodes}; unset it, or set it to the first of them"
        )
    # Jobs that share a machine must not share a port, and the ranks of a step must agree on it without communication.
    port = 20000 + (16 * found.integer("SLURM_JOB_ID") + found.integer("SLURM_STEP_ID") % 16) % 10000
    node, port = found.integer("SLURM_NODEID"), found.integer("MASTER_PORT", default=port)
    local_world = per_node[node] if node < len(per_node) else None
    rank, local_rank = found.integer("SLURM_PROCID"), found.integer("SLURM_LOCALID")
    return Placement(rank, local_rank, world, local_world, master, port, "srun")


def first_host(nodelist: str) -> str:
    """The first machine of a SLURM node list: ``gpu[07-09,12],big1`` gives ``gpu07``. SLURM runs task 0 there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group()) if first else nodelist


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's short form: ``2(x3),1`` gives [2, 2, 2, 1]."""
    return [int(n) for n, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text) for _ in range(int(times or 1))]


def _under_mpirun(found: Environment) -> bool:
    size = found.integer_or_none(*_MPI_SIZES)
    if size is None or found.has("OMPI_COMM_WORLD_SIZE") or not found.has("SLURM_STEP_ID"):
        return size is not None
    # srun sets PMI_SIZE too where SLURM's default is PMI-2, MPI or not.
    task = found.integer("SLURM_PROCID"), found.integer("SLURM_STEP_NUM_TASKS", default=size)
    return (found.integer_or_none(*_MPI_RANKS), size) != task


def _from_mpi(found: Environment) -> Placement:
    try:
        placement = _ask_mpi(found.text("MASTER_ADDR", default=""), found.integer("MASTER_PORT", default=0))
    except (ImportError, RuntimeError) as error:
        raise found.error(
            f"this process was started by mpirun, and mpi4py, which finds the other ranks, does not load ({error}); "
            "run `pip install mpi4py`, or start with torchrun"
        ) from error
    expected = found.integer_or_none(*_MPI_SIZES)
    if placement.world_size != expected:
        raise found.error(
            f"mpirun started {expected} processes, but mpi4py sees {placement.world_size}: it uses another MPI than the mpirun "
            "in the PATH; load the MPI that mpi4py was installed for, or install mpi4py again"
        )
    return placement


@functools.cache  # MPI can be started and finalized only once
def _ask_mpi(address: str, port: int) -> Placement:
    ours = "mpi4py.MPI" not in sys.modules
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    host = "127.0.0.1" if local.size == world.size else socket.gethostname()
    address, port = world.bcast((address or host, port or _free_port()), root=0)
    placement = Placement(world.rank, local.rank, world.size, local.size, address, port, "mpirun")
    if ours:
        # At exit it would wait for all ranks, and one that failed would keep mpirun from ending the others.
        MPI.Finalize()
    return placement


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
