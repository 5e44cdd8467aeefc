# SPDX-License-Identifier: Apache-2.0
"""Disks that fail under a running engine: a clear error on every rank in the same step, or a correct run."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_fp32_param
from helpers.disks import mounted
from helpers.faults import (
    Faults,
    delete,
    faulty_io,
    file_size_limit,
    fill,
    flip,
    held,
    said,
    state_path,
    truncate,
    wait_for_transfers,
)
from helpers.models import ds_config, engine_of, grass_block, train
from helpers.ranks import RankFailure, RankPool

from grass_ds.config import GrassConfigError
from grass_ds.offload.block_io import open_io
from grass_ds.offload.chunks import round_up
from grass_ds.offload.state_files import StateFiles

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

MB = 2**20
STEPS, AT = 9, 4  # trouble comes before step AT, in the middle of a sampling period
TIMEOUT = 60.0  # of a call to the ranks, which takes a second or two


def nvme(path: object, extra: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Layers of five chunks, more than host buffers: every step reads and writes files. ``extra``: for DeepSpeed."""
    offload = {"device": "nvme", "nvme_path": str(path), "chunk_numel": 1024, "host_buffers": 4, **settings}
    return config_of(offload, **(extra or {}))


def config_of(offload: dict[str, Any], **extra: Any) -> dict[str, Any]:
    block = grass_block(sampler="cyclic", cyclic_order="ascending", num_active_layers=2, offload=offload)
    return ds_config(grass=block, **extra)


# ---- inside a rank --------------------------------------------------------------------------------------------------


def fingerprint(engine: Any) -> str:
    """Hash of every bit of the weights, and of this rank's optimizer state as it can be fetched."""
    store, total = engine.optimizer.store, hashlib.sha256()
    tensors = [param.detach() for param in engine.module.parameters()]
    for state in (store[unit] for unit in engine.optimizer.units if unit in store):
        tensors += [state.master, *state.moments.values()]
        total.update(repr({key: float(value) for key, value in state.scalars.items()}).encode())
    for tensor in tensors:
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def nothing(engine: Any) -> None:
    """The disk is as it was; what goes wrong is injected."""


def run(
    config: dict[str, Any],
    trouble: Callable[[Any], None] = nothing,
    rank: int | None = None,
    fault: dict[str, Any] | None = None,
    limit: int | None = None,
    save_dir: Path | None = None,
) -> dict[str, Any]:
    """Train; before step AT, ``rank`` (None: every rank) gets into ``trouble``. Two more steps follow an error."""
    errors: dict[int, str] = {}
    faults = Faults(**(fault or {}))
    with faulty_io(faults), engine_of(config) as engine:
        concerned = rank in (None, engine.global_rank)
        train(engine, AT)
        if concerned:
            trouble(engine)
            faults.arm()
        with file_size_limit(limit if concerned else None):
            for step in range(AT, STEPS):
                error = said(lambda step=step: train(engine, 1, start=step))  # type: ignore[misc]
                if error:
                    errors[step] = error
                if len(errors) == 3:
                    break
        final = fingerprint(engine) if not errors else ""
        saved = said(lambda: engine.save_checkpoint(str(save_dir))) if save_dir is not None else ""
    return {"errors": errors, "final": final, "saved": saved, "held": held()}


def start(
    config: dict[str, Any], environment: dict[str, list[str]] | None = None, limits: tuple[Any, ...] = (None, None)
) -> dict[str, Any]:
    """Only build an engine, with environment variables and a file-size limit per rank."""
    rank = deepspeed.comm.get_rank()
    os.environ.update({name: values[rank] for name, values in (environment or {}).items()})

    def build() -> None:
        with file_size_limit(limits[rank]), engine_of(config):
            pass

    error = said(build)
    return {"error": error, "held": held()}


# ---- what every fault must end in -----------------------------------------------------------------------------------


@pytest.fixture(params=["posix", "aio"])
def io(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Both kinds of transfer, where there is AIO."""
    if request.param == "aio":
        skip_without_aio(tmp_path)
    return request.param


def skip_without_aio(path: Path) -> None:
    with closing(StateFiles(path, 0, "", {})) as files:
        try:
            open_io("aio", {}, files.direct, locked=True)
        except GrassConfigError as reason:
            pytest.skip(str(reason))


@pytest.fixture(scope="module")
def reference(two_ranks: RankPool) -> list[str]:
    """What the same run ends in without any disk."""
    return [result["final"] for result in two_ranks.run(run, config=config_of({"device": "none"}), timeout=TIMEOUT)]


def assert_released(results: list[dict[str, Any]], path: Path) -> None:
    assert [result["held"] for result in results] == [set()] * len(results)
    assert not list(path.glob("grass_ds*"))


def assert_stopped(
    results: list[dict[str, Any]], path: Path, rank: int, *words: str, steps: tuple[int, ...] = (AT,)
) -> None:
    """Every rank raised in the same step and in the next two; ``rank`` said why, the others repeated it."""
    first = {min(result["errors"]) for result in results}
    assert len(first) == 1 and first <= set(steps), results
    for number, result in enumerate(results):
        assert list(result["errors"]) == list(range(min(first), min(first) + 3))
        for error in result["errors"].values():
            assert error.startswith("OffloadError: " if number == rank else f"RankFailedError: rank {rank} failed: ")
            assert all(word in error for word in words), error
    assert_released(results, path)


def assert_correct(results: list[dict[str, Any]], path: Path, reference: list[str]) -> None:
    assert [result["errors"] for result in results] == [{}, {}]
    assert [result["final"] for result in results] == reference
    assert_released(results, path)


# ---- start ----------------------------------------------------------------------------------------------------------


def refusals(pool: RankPool, path: object, **arguments: Any) -> list[str]:
    """Why an engine cannot be built there, per rank; nothing may be left behind."""
    results = pool.run(start, config=nvme(path), timeout=TIMEOUT, **arguments)
    assert [result["held"] for result in results] == [set(), set()]
    return [result["error"] for result in results]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_path_that_one_rank_alone_cannot_use(two_ranks: RankPool, tmp_path: Path, rank: int) -> None:
    paths = [str(tmp_path), str(tmp_path)]
    paths[rank] = "/missing"
    errors = refusals(two_ranks, "$PATH_OF_THIS_RANK", environment={"PATH_OF_THIS_RANK": paths})
    assert errors[rank].startswith('GrassConfigError: grass.offload.nvme_path = "/missing": no such directory')
    assert errors[1 - rank].startswith(f'ValueError: rank {rank} failed: grass.offload.nvme_path = "/missing"')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [128 * 1024, 400 * 1024], ids=["for nobody", "for one rank"])
def test_a_disk_with_too_little_space(two_ranks: RankPool, tmp_path: Path, size: int) -> None:
    """The second size is enough for either rank alone: the space is free until they reserve it."""
    with mounted(tmp_path / "disk", size) as disk:
        errors = refusals(two_ranks, disk)
        assert all(str(disk) in error for error in errors)
        assert any("are free" in error or "No space left on device" in error for error in errors)
        assert all(error.startswith(("GrassConfigError: ", "ValueError: rank")) for error in errors)
        assert list(disk.iterdir()) == []


def test_files_that_may_not_be_as_large_on_one_rank(two_ranks: RankPool, tmp_path: Path) -> None:
    errors = refusals(two_ranks, tmp_path, limits=(None, 32 * 1024))
    assert errors[1].startswith("GrassConfigError") and "File too large" in errors[1]
    assert errors[0].startswith("ValueError: rank 1 failed: ") and "File too large" in errors[0]
    assert list(tmp_path.iterdir()) == []


# ---- disks that change under a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checksum", [False, True])
def test_deleted_files_and_checksums_do_no_harm(
    two_ranks: RankPool, tmp_path: Path, reference: list[str], io: str, checksum: bool
) -> None:
    config = nvme(tmp_path, io=io, checksum=checksum)
    results = two_ranks.run(run, config=config, trouble=delete, timeout=TIMEOUT)
    assert_correct(results, tmp_path, reference)


@pytest.mark.parametrize("io", ["posix", "auto"])
def test_space_that_others_take_later_does_no_harm(
    two_ranks: RankPool, tmp_path: Path, reference: list[str], io: str
) -> None:
    with mounted(tmp_path / "disk", 4 * MB) as disk:
        results = two_ranks.run(run, config=nvme(disk, io=io), trouble=fill, timeout=TIMEOUT)
        assert os.statvfs(disk).f_bavail * 4096 < MB  # what the state files had: the others took the rest
        assert_correct(results, disk, reference)


def test_truncated_files(two_ranks: RankPool, tmp_path: Path, io: str) -> None:
    results = two_ranks.run(run, config=nvme(tmp_path, io=io), trouble=truncate, rank=1, timeout=TIMEOUT)
    assert_stopped(results, tmp_path, 1, f"{tmp_path}/grass_ds_rank1/", "instead of", "truncated")


def test_writes_that_the_kernel_refuses(two_ranks: RankPool, tmp_path: Path, io: str) -> None:
    """AIO calls these a success."""
    results = two_ranks.run(run, config=nvme(tmp_path, io=io), rank=0, limit=4096, timeout=TIMEOUT)
    assert_stopped(results, tmp_path, 0, f"{tmp_path}/grass_ds_rank0/", "File too large", steps=(AT, AT + 1))


def test_a_flipped_bit_with_checksums(two_ranks: RankPool, tmp_path: Path, io: str) -> None:
    results = two_ranks.run(run, config=nvme(tmp_path, io=io, checksum=True), trouble=flip, rank=1, timeout=TIMEOUT)
    assert_stopped(results, tmp_path, 1, f"{tmp_path}/grass_ds_rank1/", "checksum mismatch")


# ---- errors in I/O threads ------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # fault, settings
    "read": ({"verb": "read"}, {}),
    "read-late": ({"verb": "read", "nth": 7}, {}),
    "read-step": ({"verb": "read", "nth": 3}, {"prefetch": "step", "device_buffers": 1}),
    "read-period": ({"verb": "read"}, {"residency": "period"}),
    "write": ({"verb": "write"}, {}),
    "write-late": (
        {"verb": "write", "nth": 10},
        {},
    ),  # the last of a step: it shows when backward is under way on the other rank
    "write-period": ({"verb": "write"}, {"residency": "period"}),
    "write-leaving": ({"verb": "write"}, {"host_buffers": None}),
    "stage-1": ({"verb": "read", "nth": 5}, {"extra": {"stage": 1, "gas": 2}}),
    "thread": ({"verb": "read", "way": "thread"}, {}),
    "memory": ({"verb": "write", "nth": 10, "way": "memory"}, {}),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_goes_wrong_in_a_thread_stops_every_rank_in_the_same_step(
    two_ranks: RankPool, tmp_path: Path, case: str
) -> None:
    fault, settings = FAULTS[case]
    config = nvme(tmp_path / "disk", io="posix", **settings)
    (tmp_path / "disk").mkdir()
    results = two_ranks.run(run, config=config, rank=1, fault=fault, save_dir=tmp_path / "checkpoint", timeout=TIMEOUT)
    words = (f"{tmp_path}/disk/grass_ds_rank1/", "failed: injected")
    assert_stopped(results, tmp_path / "disk", 1, *words, steps=tuple(range(AT, AT + 4)))
    assert results[0]["saved"].startswith("RankFailedError: rank 1 failed") and results[1]["saved"].startswith(
        "OffloadError"
    )
    assert not (tmp_path / "checkpoint").exists()


# ---- flush and checkpoints ------------------------------------------------------------------------------------------


def differing_files(engine: Any) -> list[str]:
    """Units whose file does not hold their state: master | moments, each plane on a boundary of its own."""
    differing, store = [], engine.optimizer.store
    for unit in (unit for unit in engine.optimizer.units if unit in store):
        path = state_path(engine, unit)
        planes = torch.from_file(str(path), False, 3 * round_up(unit.shard_numel)).chunk(3)
        on_disk = [plane[: unit.shard_numel].clone() for plane in planes]
        state = store[unit]
        if not all(map(torch.equal, on_disk, [state.master, *state.moments.values()])):
            differing.append(unit.name)
    return differing


def flush_slow_disk(config: dict[str, Any], save_dir: Path | None) -> tuple[int, int, list[str]]:
    """Writes done by the end of training, and by the end of a flush; and what is then not in the files."""
    with faulty_io(Faults(slow=0.02)) as faults, engine_of(config) as engine:
        train(engine, AT)
        before = faults.count["write"]
        engine.optimizer.flush() if save_dir is None else engine.save_checkpoint(str(save_dir))
        return before, faults.count["write"], differing_files(engine)


@pytest.mark.parametrize("host_buffers", [4, None])
@pytest.mark.parametrize("by", ["flush", "checkpoint"])
def test_a_flush_waits_until_everything_is_in_the_files(
    two_ranks: RankPool, tmp_path: Path, host_buffers: int | None, by: str
) -> None:
    (tmp_path / "disk").mkdir()
    save_dir = tmp_path / "checkpoint" if by == "checkpoint" else None
    config = nvme(tmp_path / "disk", io="posix", host_buffers=host_buffers)
    for before, after, differing in two_ranks.run(flush_slow_disk, config=config, save_dir=save_dir, timeout=TIMEOUT):
        assert before < after or host_buffers  # without a number all chunks stay in buffers until then
        assert differing == []


def flush(engine: Any, folder: Path) -> None:
    engine.optimizer.flush()


def save(engine: Any, folder: Path) -> None:
    engine.save_checkpoint(str(folder), tag="second")


def load(engine: Any, folder: Path) -> None:
    engine.load_checkpoint(str(folder), tag="first")


def get_state(engine: Any, folder: Path) -> None:
    for param in engine.module.model.layers[0].parameters():
        safe_get_full_optimizer_state(param, "exp_avg")


def set_weights(engine: Any, folder: Path) -> None:
    for param in engine.module.model.layers[0].parameters():
        safe_set_full_fp32_param(param, torch.zeros_like(param))


def refresh(engine: Any, folder: Path) -> None:
    engine.optimizer.refresh_fp32_params()


def update(engine: Any, folder: Path) -> None:
    engine.optimizer.update_lp_params()


def use(
    config: dict[str, Any], action: Callable[[Any, Path], None], fault: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Save once, go on, and do something that fails on rank 1; then another step."""
    faults = Faults(**fault)
    with faulty_io(faults), engine_of(config) as engine:
        train(engine, AT)
        engine.save_checkpoint(str(folder), tag="first")
        train(engine, 1, start=AT)
        if fault["verb"] == "read":
            wait_for_transfers(engine)
        if engine.global_rank == 1:
            faults.arm()
        errors = [said(lambda: action(engine, folder)), said(lambda: train(engine, 1, start=AT + 1))]
    return {"errors": errors, "held": held()}


@pytest.mark.parametrize(
    ("action", "verb"),
    [
        (flush, "write"),
        (save, "write"),
        (save, "read"),
        (load, "write"),
        (get_state, "read"),
        (set_weights, "read"),
        (refresh, "read"),
        (update, "read"),
    ],
)
def test_what_every_rank_calls_fails_on_every_rank(
    two_ranks: RankPool, tmp_path: Path, action: Callable[[Any, Path], None], verb: str
) -> None:
    (tmp_path / "disk").mkdir()
    config = nvme(tmp_path / "disk", io="posix", host_buffers=None if verb == "write" else 4)
    arguments = {"config": config, "action": action, "fault": {"verb": verb}, "folder": tmp_path / "checkpoint"}
    results = two_ranks.run(use, timeout=TIMEOUT, **arguments)
    for rank, result in enumerate(results):
        for error in result["errors"]:
            assert error.startswith("OffloadError: " if rank == 1 else "RankFailedError: rank 1 failed: "), results
            assert f"{tmp_path}/disk/grass_ds_rank1/" in error and "failed: injected" in error
    assert_released(results, tmp_path / "disk")
    assert (tmp_path / "checkpoint" / "latest").read_text() == "first"


# ---- other jobs -----------------------------------------------------------------------------------------------------

ENGINES: list[Any] = []  # of the rank, from one call to the next


@pytest.fixture(scope="module")
def other_job() -> Iterator[RankPool]:
    """Two ranks of another run, which may be killed."""
    pool = RankPool(2)
    yield pool
    pool.close()


def begin(config: dict[str, Any], job: str) -> None:
    os.environ["SLURM_JOB_ID"] = job
    context = engine_of(config)
    ENGINES[:] = [context, context.__enter__()]
    train(ENGINES[1], AT)


def finish() -> dict[str, Any]:
    context, engine = ENGINES
    train(engine, STEPS - AT, start=AT)
    final = fingerprint(engine)
    context.__exit__(None, None, None)
    ENGINES.clear()
    return {"errors": {}, "final": final, "held": held()}


def test_a_second_job_on_the_path_is_refused_and_the_first_goes_on(
    two_ranks: RankPool, other_job: RankPool, tmp_path: Path, reference: list[str]
) -> None:
    other_job.run(begin, config=nvme(tmp_path), job="4711", timeout=TIMEOUT)
    for error in refusals(two_ranks, tmp_path):
        assert error.startswith("GrassConfigError: ") and "is in use" in error and "job SLURM_JOB_ID=4711" in error
    assert_correct(other_job.run(finish, timeout=TIMEOUT), tmp_path, reference)


def test_a_rank_killed_while_it_writes(
    two_ranks: RankPool, other_job: RankPool, tmp_path: Path, reference: list[str]
) -> None:
    """The other rank ends with an error, soon; what both leave behind is in nobody's way."""
    fault = {"verb": "write", "nth": 3, "way": "kill"}
    with pytest.raises(RankFailure) as failure:
        other_job.run(run_to_the_end, config=nvme(tmp_path), fault=fault, timeout=TIMEOUT)
    assert "rank 1 died with exit code -9" in str(failure.value)
    assert "no answer from ranks []" in str(failure.value)  # within the grace that is left to the others
    assert list((tmp_path / "grass_ds_rank1").glob("*.state"))
    results = two_ranks.run(run, config=nvme(tmp_path), timeout=TIMEOUT)
    assert_correct(results, tmp_path, reference)


def run_to_the_end(config: dict[str, Any], fault: dict[str, Any]) -> None:
    """Train as scripts do, which end with the first error; the fault is rank 1's."""
    with faulty_io(Faults(**fault)) as faults, engine_of(config) as engine:
        train(engine, AT)
        if engine.global_rank == 1:
            faults.arm()
        train(engine, 100, start=AT)
