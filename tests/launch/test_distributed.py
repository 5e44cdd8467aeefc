# SPDX-License-Identifier: Apache-2.0
"""Which rank says what ended the run before there is a process group."""

import pytest

from grass_ds.cluster import placement
from grass_ds.cluster.environment import PlacementError
from launch import distributed


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "said"),
    [
        (0, 0, ValueError("typo"), "\nerror [rank 0]: typo\n"),
        (1, 1, ValueError("typo"), ""),
        (2, 0, OSError("not on this machine"), "\nerror [rank 2]: not on this machine\n"),
        (3, 1, PlacementError("set wrongly"), "\nerror [rank 3]: set wrongly\n"),
    ],
)
def test_a_mistake_is_said_once_per_machine_and_that_of_one_rank_by_it(
    rank: int,
    local_rank: int,
    error: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(placement, "_exported", [])
    for name, value in {"RANK": rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    distributed.report_error(error)
    assert capsys.readouterr().err == said


def test_a_rank_that_its_launcher_counts_wrongly_says_so() -> None:
    """A variable of an outer launcher that DeepSpeed's leaves as it is: only rank 1 can see it."""
    variables = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for rank in range(2):
        found = {**variables, "RANK": rank, "LOCAL_RANK": rank}
        environment = {name: str(value) for name, value in found.items()}
        if rank == 0:
            assert placement.find(environment).world_size == 2
        else:
            with pytest.raises(PlacementError, match="LOCAL_RANK=1 must be below the number of ranks on this machine"):
                placement.find(environment)
