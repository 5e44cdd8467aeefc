# SPDX-License-Identifier: Apache-2.0
"""Where this process stands among the ranks: found from what the launcher left in the environment.

[Note: Placement] DeepSpeed, accelerate and torch read ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``. torchrun,
``accelerate launch`` and DeepSpeed's launcher set them; ``srun`` and ``mpirun`` say the same in words of their own, and nobody says anything
where there is no launcher. :func:`find` understands all of them and :meth:`Placement.export` translates. Two that contradict each other are
an error: ``srun -n 2 torchrun --standalone`` would train two models into one folder, and a ``RANK`` that ``sbatch`` carried over from the
shell would make every task rank 0.
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

# Launchers that start one process per rank in an environment of its own; the devices of others' ranks may be hidden in it.
_PER_RANK = ("srun", "mpirun")
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
_MPI_RANKS = ("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")
_SHOWN = re.compile(
    r"(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|(CROSS|LOCAL)_SIZE|MASTER_(ADDR|PORT)|(OMPI|MV2)_COMM_WORLD_(LOCAL_)?(RANK|SIZE)|PMI_(RANK|SIZE)"
    r"|SLURM_(JOB_ID|STEP_ID|PROCID|LOCALID|NTASKS|NODEID|STEP_NUM_TASKS|STEP_NODELIST|STEP_TASKS_PER_NODE)"
)


_GLOO_RELEASE_SECONDS = 0.25


class PlacementError(ValueError):
    """What the launchers say is incomplete, or they contradict each other. The message shows what was seen."""


@dataclass(frozen=True)
class Placement:
    """One process among the ranks of a run.

    Attributes:
        rank: global rank, in 0 .. world_size - 1.
        local_rank: the same among the ranks of this machine.
        world_size: number of ranks.
        local_world_size: number of ranks on this machine, None if nobody said.
        master_addr: name or address of the machine of rank 0.
        master_port: TCP port on it at which ranks meet.
        launcher: who said so: "torchrun" (also ``accelerate launch``), "deepspeed", "srun", "mpirun", "environment" (the variables alone)
            or "none" (one process).
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int | None
    master_addr: str
    master_port: int
    launcher: str

    def device_index(self, visible: int) -> int:
        """Which of the ``visible`` devices is this rank's.

        With one device per task (``srun --gpus-per-task=1``) each rank has a "device 0" of its own; with all devices visible a rank takes
        the one of its local rank.

        Raises:
            PlacementError: no device is visible, or one launcher has started more ranks here than devices are.
        """
        if self.launcher in _PER_RANK and visible:
            return self.local_rank % visible
        if self.local_rank >= visible:
            raise PlacementError(
                f"local rank {self.local_rank} has no device: {visible} visible on {socket.gethostname()}, "
                f"{self.local_world_size} ranks there (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}); "
                f"start at most {visible} per machine (torchrun --nproc-per-node, deepspeed --num_gpus), or show more devices"
            )
        return self.local_rank

    def export(self) -> None:
        """Say it in the variables that torch, DeepSpeed and accelerate read, for this process and its children.

        They take ``LOCAL_RANK`` for the index of the device; so where each task sees a single one, that is what it becomes. :func:`find` in this
        process still tells the local rank.

        Raises:
            PlacementError: there is no device for this rank.
        """
        accelerator = get_accelerator()
        cpu = accelerator.device_name() == "cpu"
        index = self.local_rank if cpu else self.device_index(accelerator.device_count())
        said = {
            "RANK": self.rank,
            "LOCAL_RANK": index,
            "WORLD_SIZE": self.world_size,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        os.environ.update({name: str(value) for name, value in said.items() if value is not None})
        if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed insists that both be equal
            os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(index)
        _exported.append(self)


_exported: list[Placement] = []


def exported() -> Placement | None:
    """What this process has exported last."""
    return _exported[-1] if _exported else None


def find(environ: Mapping[str, str] | None = None) -> Placement:
    """Where this process stands: see [Note: Placement].

    Under ``mpirun`` all ranks have to call it, since they tell each other where rank 0 is; otherwise it reads the environment and nothing else.

    Raises:
        PlacementError: the launchers contradict each other, or say too little.
    """
    if environ is None and (here := exported()) is not None:
        return here
    seen = _Seen(os.environ if environ is None else environ)
    if seen.has("RANK"):
        return _from_variables(seen)
    if _under_mpirun(seen):
        return _from_mpi(seen)
    if seen.has("SLURM_STEP_ID"):
        return _from_slurm(seen)
    if seen.integer("WORLD_SIZE", default=1) > 1:
        return _from_variables(seen)  # which says what is missing
    if seen.integer("SLURM_NTASKS", default=1) > 1:
        raise seen.error(
            f"this SLURM job has {seen.text('SLURM_NTASKS')} tasks, but the program was started without srun and would run once; put srun "
            "before it (or torchrun, deepspeed, mpirun), or set SLURM_NTASKS=1 for a single process"
        )
    return Placement(0, 0, 1, 1, "127.0.0.1", _free_port(), "none")


def leave_process_group() -> None:
    """Leave the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo lets go of the tensors that it sent a moment after they arrived, and needs the interpreter for it. If that
        # is gone by then the process aborts, and a run that went well ends with an error.
        time.sleep(_GLOO_RELEASE_SECONDS)


class _Seen:
    """The environment, with errors that show it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def has(self, name: str) -> bool:
        return self._environ.get(name, "") != ""

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of the names that is set."""
        found = next((self._environ[name] for name in names if self.has(name)), default)
        if found is None:
            raise self.error(
                f"{names[0]} is not set; start with torchrun, deepspeed, accelerate launch, srun or mpirun, which set it"
            )
        return found

    def integer(self, *names: str, default: int | None = None) -> int:
        """The same, as a number that is at least 0."""
        text = self.text(*names, default=None if default is None else str(default))
        if not text.isdecimal():
            name = next(name for name in names if self.has(name))
            raise self.error(f"{name}={text!r} must be a whole number, at least 0")
        return int(text)

    def first(self, names: tuple[str, ...]) -> int | None:
        return next((self.integer(name) for name in names if self.has(name)), None)

    def error(self, message: str) -> PlacementError:
        shown = [f"{name}={value}" for name, value in sorted(self._environ.items()) if _SHOWN.fullmatch(name)]
        return PlacementError(f"{message}. Seen: {' '.join(shown) or 'no variable of any launcher'}")


# ---- RANK and its relatives ------------------------------------------------------------------------------------------------


def _from_variables(seen: _Seen) -> Placement:
    rank, world = seen.integer("RANK"), seen.integer("WORLD_SIZE")
    launcher = (
        "torchrun" if seen.has("TORCHELASTIC_RUN_ID") else "deepspeed" if seen.has("CROSS_SIZE") else "environment"
    )
    if rank >= world:
        raise seen.error(f"RANK={rank} must be below WORLD_SIZE={world}")
    _check_against_mpi(seen, rank, world)
    if seen.has("SLURM_STEP_ID") and not _under_mpirun(seen):
        slurm = _from_slurm(seen, check_world=False)
        if _check_against_slurm(seen, rank, world, slurm):
            return slurm
    alone = world == 1
    local_rank = seen.integer("LOCAL_RANK", default=0 if alone else None)
    local_world = seen.first(("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    if local_world is not None and local_rank >= local_world:
        raise seen.error(f"LOCAL_RANK={local_rank} must be below the number of ranks on this machine, {local_world}")
    return Placement(
        rank,
        local_rank,
        world,
        1 if alone else local_world,
        seen.text("MASTER_ADDR", default="127.0.0.1" if alone else None),
        seen.integer("MASTER_PORT", default=_free_port() if alone else None),
        launcher,
    )


def _check_against_mpi(seen: _Seen, rank: int, world: int) -> None:
    found = seen.first(("OMPI_COMM_WORLD_RANK",)), seen.first(("OMPI_COMM_WORLD_SIZE",))
    if None not in found and found != (rank, world):
        raise seen.error(
            f"RANK={rank} of WORLD_SIZE={world}, but mpirun calls this process {found[0]} of {found[1]}; unset RANK, LOCAL_RANK and WORLD_SIZE "
            "before mpirun, or start another launcher without mpirun"
        )


def _check_against_slurm(seen: _Seen, rank: int, world: int, slurm: Placement) -> bool:
    """Whether srun started each rank and agrees: then what it says is complete. Else it started launchers, one per machine, or a shell."""
    agents = seen.first(("GROUP_WORLD_SIZE", "CROSS_SIZE"))
    if slurm.world_size == 1:
        return False  # a step of one task says nothing of other steps and of what was started in it
    if agents is not None:
        if agents != slurm.world_size:
            raise seen.error(
                f"srun started {slurm.world_size} tasks, but the launcher in them counts {agents} machines; start torchrun or deepspeed once per "
                "machine (srun --ntasks-per-node=1) and tell it of all of them (torchrun --nnodes=$SLURM_NNODES --rdzv-endpoint=...)"
            )
        return False
    if (slurm.rank, slurm.world_size) != (rank, world):
        raise seen.error(
            f"RANK={rank} of WORLD_SIZE={world}, but srun calls this process {slurm.rank} of {slurm.world_size}; sbatch carries the variables of "
            "the shell into the job: unset RANK, LOCAL_RANK, WORLD_SIZE before it"
        )
    return True


# ---- srun ------------------------------------------------------------------------------------------------------------------


def _from_slurm(seen: _Seen, check_world: bool = True) -> Placement:
    rank, local_rank = seen.integer("SLURM_PROCID"), seen.integer("SLURM_LOCALID")
    world = seen.integer("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if check_world and seen.integer("WORLD_SIZE", default=world) != world:
        raise seen.error(
            f"WORLD_SIZE={seen.text('WORLD_SIZE')}, but srun started {world} tasks; unset it, or correct srun's --ntasks"
        )
    nodes = seen.text("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    per_node = _tasks_per_node(seen.text("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", default=""))
    node = seen.integer("SLURM_NODEID")
    master = seen.text("MASTER_ADDR", default=first_host(nodes))
    if len(per_node) > 1 and (master == "localhost" or master.startswith("127.")):
        raise seen.error(
            f"MASTER_ADDR={master} means another machine on each of {nodes}; unset it, or set it to the first of them"
        )
    # Jobs that share a machine must not share a port, and the ranks of a step must agree on it without talking.
    port = 20000 + (16 * seen.integer("SLURM_JOB_ID") + seen.integer("SLURM_STEP_ID") % 16) % 10000
    local_world = per_node[node] if node < len(per_node) else None
    return Placement(rank, local_rank, world, local_world, master, seen.integer("MASTER_PORT", default=port), "srun")


def first_host(nodelist: str) -> str:
    """The first machine of a SLURM node list: ``gpu[07-09,12],big1`` gives ``gpu07``. SLURM runs task 0 there."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first.group()) if first else nodelist


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's short form: ``2(x3),1`` gives [2, 2, 2, 1]."""
    return [int(n) for n, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", text) for _ in range(int(times or 1))]


# ---- mpirun ----------------------------------------------------------------------------------------------------------------


def _under_mpirun(seen: _Seen) -> bool:
    size = seen.first(_MPI_SIZES)
    # srun sets PMI_SIZE too where SLURM's default is PMI-2, MPI or not.
    return size is not None and not (
        seen.has("SLURM_STEP_ID")
        and not seen.has("OMPI_COMM_WORLD_SIZE")
        and (seen.first(_MPI_RANKS), size)
        == (seen.integer("SLURM_PROCID"), seen.integer("SLURM_STEP_NUM_TASKS", default=size))
    )


def _from_mpi(seen: _Seen) -> Placement:
    try:
        found = _ask_mpi(seen.text("MASTER_ADDR", default=""), seen.integer("MASTER_PORT", default=0))
    except (ImportError, RuntimeError) as error:
        raise seen.error(
            f"this process was started by mpirun, and mpi4py, which finds the other ranks, does not load ({error}); "
            "run `pip install mpi4py`, or start with torchrun"
        ) from error
    expected = seen.first(_MPI_SIZES)
    if found.world_size != expected:
        raise seen.error(
            f"mpirun started {expected} processes, but mpi4py sees {found.world_size}: it uses another MPI than the mpirun in the PATH; "
            "load the MPI that mpi4py was installed for, or install mpi4py again"
        )
    return found


@functools.cache  # MPI can be begun and ended but once
def _ask_mpi(address: str, port: int) -> Placement:
    ours = "mpi4py.MPI" not in sys.modules
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    host = "127.0.0.1" if local.size == world.size else socket.gethostname()
    address, port = world.bcast((address or host, port or _free_port()), root=0)
    found = Placement(world.rank, local.rank, world.size, local.size, address, port, "mpirun")
    if ours:
        MPI.Finalize()  # at exit it would wait for all ranks, and one that failed would keep mpirun from ending the others
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
