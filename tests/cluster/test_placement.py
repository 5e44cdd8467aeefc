# SPDX-License-Identifier: Apache-2.0
"""The environments of real launchers, and the placements that are read from them."""

import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from unittest import mock

import pytest

from grass_ds.cluster import placement
from grass_ds.cluster.placement import Placement, PlacementError, find


def variables(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


MASTER = variables("MASTER_ADDR=n1 MASTER_PORT=29500")
RANK_3_OF_4 = variables("RANK=3 LOCAL_RANK=1 WORLD_SIZE=4") | MASTER
TORCHRUN = RANK_3_OF_4 | variables("LOCAL_WORLD_SIZE=2 GROUP_RANK=1 GROUP_WORLD_SIZE=2 TORCHELASTIC_RUN_ID=7")
DEEPSPEED = RANK_3_OF_4 | variables("LOCAL_SIZE=2 CROSS_RANK=1 CROSS_SIZE=2")
# As in the batch script of a job of 2 machines x 2 tasks, and in its second task on the second machine.
BATCH = variables(
    "SLURM_JOB_ID=123 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_NTASKS=4 SLURM_NNODES=2 "
    "SLURM_JOB_NODELIST=gpu[07-08] SLURM_TASKS_PER_NODE=2(x2)"
)
SRUN = BATCH | variables(
    "SLURM_STEP_ID=1 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NODELIST=gpu[07-08] SLURM_STEP_TASKS_PER_NODE=2(x2) "
    "SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NODEID=1"
)
PER_MACHINE = SRUN | variables("SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE=1(x2)")
ONE_TASK = SRUN | variables(
    "SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_STEP_NODELIST=gpu07 "
    "SLURM_STEP_TASKS_PER_NODE=1"
)
SLURM_PORT = 20000 + 16 * 123 + 1

FOUND = {
    "torchrun": (TORCHRUN, Placement(3, 1, 4, 2, "n1", 29500, "torchrun")),
    "deepspeed": (DEEPSPEED, Placement(3, 1, 4, 2, "n1", 29500, "deepspeed")),
    "variables": (RANK_3_OF_4, Placement(3, 1, 4, None, "n1", 29500, "environment")),
    "srun": (SRUN, Placement(3, 1, 4, 2, "gpu07", SLURM_PORT, "srun")),
    "srun-with-address": (SRUN | MASTER, Placement(3, 1, 4, 2, "n1", 29500, "srun")),
    "srun-with-pmi2": (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Placement(3, 1, 4, 2, "gpu07", SLURM_PORT, "srun")),
    "srun-and-the-same-in-variables": (SRUN | RANK_3_OF_4, Placement(3, 1, 4, 2, "n1", 29500, "srun")),
    "srun-one-task": (ONE_TASK, Placement(0, 0, 1, 1, "gpu07", SLURM_PORT, "srun")),
    "torchrun-under-srun": (PER_MACHINE | TORCHRUN, Placement(3, 1, 4, 2, "n1", 29500, "torchrun")),
    "deepspeed-under-srun": (PER_MACHINE | DEEPSPEED, Placement(3, 1, 4, 2, "n1", 29500, "deepspeed")),
    "torchrun-in-the-batch-script": (BATCH | TORCHRUN, Placement(3, 1, 4, 2, "n1", 29500, "torchrun")),
    "own-processes-in-one-task": (ONE_TASK | RANK_3_OF_4, Placement(3, 1, 4, None, "n1", 29500, "environment")),
    "one-torchrun-per-step": (ONE_TASK | TORCHRUN, Placement(3, 1, 4, 2, "n1", 29500, "torchrun")),
    "srun-with-world-size": (SRUN | {"WORLD_SIZE": "4"}, Placement(3, 1, 4, 2, "gpu07", SLURM_PORT, "srun")),
    # Open MPI in a job of three machines: its daemons are a step of their own, whose variables the ranks inherit.
    "mpirun-exported": (
        PER_MACHINE
        | RANK_3_OF_4
        | {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        Placement(3, 1, 4, 2, "n1", 29500, "environment"),
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case: str) -> None:
    environ, expected = FOUND[case]
    assert find(environ) == expected


@pytest.mark.parametrize("environ", [{}, {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_needs_no_launcher(environ: dict[str, str]) -> None:
    found = find(environ)
    assert (found.rank, found.local_rank, found.world_size, found.local_world_size) == (0, 0, 1, 1)
    assert found.master_addr == "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", found.master_port))


REFUSED = {
    "half": ({"RANK": "0"}, "WORLD_SIZE is not set"),
    "other-half": ({"WORLD_SIZE": "2"}, "RANK is not set"),
    "srun-with-another-world-size": (SRUN | {"WORLD_SIZE": "8"}, "WORLD_SIZE=8, but srun started 4 tasks"),
    "no-address": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "MASTER_ADDR is not set"),
    "not-a-number": (RANK_3_OF_4 | {"RANK": "three"}, "RANK='three' must be a whole number"),
    "rank-too-large": (RANK_3_OF_4 | {"RANK": "4"}, "RANK=4 must be below WORLD_SIZE=4"),
    "local-rank-too-large": (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below"),
    "srun-forgotten": (BATCH, "started without srun"),
    "torchrun-per-task": (SRUN | TORCHRUN, "srun started 4 tasks, but the launcher in them counts 2 machines"),
    "torchrun-standalone": (PER_MACHINE | TORCHRUN | {"GROUP_WORLD_SIZE": "1"}, "counts 1 machines"),
    "carried-over": (SRUN | RANK_3_OF_4 | {"RANK": "0", "WORLD_SIZE": "1"}, "sbatch carries the variables"),
    "localhost": (SRUN | {"MASTER_ADDR": "localhost"}, "MASTER_ADDR=localhost means another machine"),
    "mpirun-and-variables": (
        RANK_3_OF_4 | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"},
        "mpirun calls this process 1 of 4",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_contradictions_show_what_was_seen(case: str) -> None:
    environ, message = REFUSED[case]
    with pytest.raises(PlacementError, match="Seen: ") as raised:
        find(environ)
    assert message in str(raised.value)
    name = next(name for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS") if name in environ)
    assert f"{name}={environ[name]}" in str(raised.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[07-09,12],big1", "gpu07"),
        ("big1,gpu[07-09]", "big1"),
        ("r[1-2]n[03,05]", "r1n03"),
        ("a-[2]b", "a-2b"),
    ],
)
def test_first_host_of_a_node_list(nodelist: str, host: str) -> None:
    assert placement.first_host(nodelist) == host


@pytest.mark.parametrize(("launcher", "local_rank", "visible", "index"), [
    ("srun", 3, 8, 3),  # all devices visible to each task
    ("srun", 3, 1, 0),  # --gpus-per-task=1: each has its own "device 0"
    ("mpirun", 1, 1, 0),
    ("torchrun", 3, 4, 3),
    ("none", 0, 1, 0),
])  # fmt: skip
def test_device_of_a_rank(launcher: str, local_rank: int, visible: int, index: int) -> None:
    assert Placement(local_rank, local_rank, 8, 8, "n1", 1, launcher).device_index(visible) == index


def test_ranks_that_share_too_few_devices_are_refused() -> None:
    with pytest.raises(PlacementError, match="local rank 2 has no device: 2 visible"):
        Placement(2, 2, 4, 4, "n1", 1, "torchrun").device_index(2)


def export_where_one_device_is_visible(environ: dict[str, str]) -> tuple[list[str | None], Placement]:
    """What is exported, and what :func:`find` says afterwards."""
    device = SimpleNamespace(device_name=lambda: "cuda", device_count=lambda: 1)
    with mock.patch.object(placement, "get_accelerator", return_value=device):
        find(environ).export()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return [os.environ.get(name) for name in names], find()


def test_where_each_task_sees_one_device_local_rank_becomes_its_index() -> None:
    """accelerate and DeepSpeed use LOCAL_RANK as the device; :func:`find` still returns the local rank."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as process:  # which exports to itself alone
        exported, found = process.submit(export_where_one_device_is_visible, SRUN).result()
    assert exported == ["3", "0", "4", "2", "gpu07"]
    assert found == find(SRUN)
