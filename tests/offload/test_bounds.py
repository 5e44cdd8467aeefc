# SPDX-License-Identifier: Apache-2.0
"""What offload may take, and that it gives everything back: device and host bytes, threads, descriptors, files and
locks.

Nothing is taken on the library's word: device buffers are the storages that are alive, the rest is what the kernel
says.
"""

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.disks import aio_or_skip, start_python
from helpers.live import LiveBytes, process_bytes, tensors_in
from helpers.models import ds_config, engine_of, grass_block, split_groups, tiny_llama, train
from helpers.ranks import free_port, rank_environment
from helpers.tiered import tiered

LAYERS, GAMMA = 5, 2
GRAIN = 1024  # elements
STATE = 12  # bytes per element: fp32 weights and two moments
POSIX, AIO = {"device": "nvme", "io": "posix"}, {"device": "nvme", "io": "aio"}


def often(folder: Path, offload: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A config that draws two of five layers anew after every step."""
    offload = {"nvme_path": str(folder), **offload}
    return ds_config(
        dtype="bf16",
        grass=grass_block(sampler="uniform", num_active_layers=GAMMA, sample_period=1, offload=offload, **settings),
    )


def open_files(folder: Path) -> int:
    """Descriptors of this process that lead to files in ``folder``, deleted ones included."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(folder) in os.readlink(link)
        except FileNotFoundError:  # the one that lists the directory
            continue
    return count


def footprint(folder: Path) -> dict[str, int]:
    """What this rank holds besides memory of its own."""
    gc.collect()
    return {
        "files": sum(len(names) for *_, names in os.walk(folder)),  # which lets another rank remove a folder meanwhile
        "descriptors": len(os.listdir("/proc/self/fd")),
        "state files": open_files(folder),
        "threads": threading.active_count(),
        "kernel threads": len(os.listdir("/proc/self/task")),
        "locked": process_bytes("VmLck"),
        "tensors": sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()),
    }


class BufferBytes(LiveBytes):
    """Bytes of live memory allocated by ``empty`` in pieces of these sizes: results of arithmetic do not count."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format:
            for tensor in tensors_in(result):
                self._add(tensor)
        return result


# ---- while it runs --------------------------------------------------------------------------------------------------


def watch_bytes(config: dict[str, Any], numel: int) -> dict[str, Any]:
    """Peak of the live device buffers, and what the library says at every step; ``numel``: elements of one."""
    model = tiny_llama(layers=LAYERS)
    with (
        BufferBytes(sizes={4 * numel}) as live,
        engine_of(config, model, model_parameters=split_groups(model)) as engine,
    ):
        units = engine.optimizer.units
        said: list[dict[str, int]] = []
        train(engine, 12, after_step=lambda _: said.append(engine.grass.memory()["optimizer_state"]))
        return {
            "peak": live.peak,
            "said peak": engine.grass.memory(peak=True)["optimizer_state"]["device"],
            "said": said,
            "shards": sum(unit.shard_numel for unit in units if unit.ever_active),
            "files": sum(-(-unit.shard_numel // GRAIN) * GRAIN for unit in units if unit.ever_active),
            "largest": max(unit.shard_numel for unit in units),
        }


# chunk_numel asked for, elements of a device buffer
CHUNKS = {"grain": (1, GRAIN), "odd": (1500, 2 * GRAIN)}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("device_buffers", "chunk"), tiered(itertools.product([1, 2, 3], CHUNKS), (1, "odd"), (3, "grain"))
)
def test_device_buffers_are_as_large_as_asked_for_and_the_host_holds_state_or_buffers(
    two_ranks: Any, device_buffers: int, chunk: str, tmp_path: Path
) -> None:
    asked, numel = CHUNKS[chunk]
    device_bytes = device_buffers * numel * STATE
    sizes = {"chunk_numel": asked, "device_buffers": device_buffers}
    host_buffers = device_buffers + 3
    for seen in two_ranks.run(watch_bytes, config=often(tmp_path, {**sizes, "device": "cpu"}), numel=numel):
        assert seen["largest"] > 2 * numel
        assert seen["peak"] == seen["said peak"] == device_bytes
        host = [now["host"] for now in seen["said"]]
        assert 0 < host[0] < host[-1] <= seen["shards"] * STATE
        assert all(now["device"] <= device_bytes for now in seen["said"])
    config = often(tmp_path, {**sizes, **POSIX, "host_buffers": host_buffers})
    for seen in two_ranks.run(watch_bytes, config=config, numel=numel):
        assert seen["peak"] == seen["said peak"] == device_bytes
        assert {now["host"] for now in seen["said"]} == {host_buffers * numel * STATE}
        assert {now["nvme"] for now in seen["said"]} == {seen["files"] * STATE}
        assert all(now["device"] <= device_bytes for now in seen["said"])


def watch_period(config: dict[str, Any]) -> tuple[int, int]:
    """Peak of the device's state, and the state of two active sets."""
    model = tiny_llama(layers=LAYERS)
    with engine_of(config, model, model_parameters=split_groups(model)) as engine:
        train(engine, 20)
        units = engine.optimizer.units
        always = sum(unit.shard_numel for unit in units if unit.always)
        layer = sum(unit.shard_numel for unit in units if unit.layer == 0)
        return engine.grass.memory(peak=True)["optimizer_state"]["device"], STATE * (always + 2 * GAMMA * layer)


@pytest.mark.dist
def test_period_holds_the_active_layers_and_the_next(two_ranks: Any, tmp_path: Path) -> None:
    for peak, limit in two_ranks.run(watch_period, config=often(tmp_path, {"device": "cpu", "residency": "period"})):
        assert limit / 2 < peak <= limit


def watch_growth(config: dict[str, Any], folder: Path, switches: tuple[int, ...]) -> list[dict[str, int]]:
    """What is held after each of these numbers of steps."""
    model, seen, start = tiny_llama(layers=LAYERS), [], 0
    with engine_of(config, model, model_parameters=split_groups(model)) as engine:
        for end in switches:
            train(engine, end - start, start=start)
            engine.optimizer.flush()
            torch.distributed.barrier()  # the folder is shared: another rank may not be done with its files
            state = engine.grass.memory()["optimizer_state"]
            seen.append({**footprint(folder), **state, "memory": process_bytes("VmRSS")})
            torch.distributed.barrier()
            start = end
    return seen


CHUNK = 4 * GRAIN  # elements, two of which make up a layer
NOISE = 6 * 2**20  # bytes; two hundred switches that lost one chunk of state each would lose 9.6 MB


@pytest.mark.dist
@pytest.mark.parametrize(
    "offload",
    [
        pytest.param(
            {"device": "cpu", "residency": "period", "chunk_numel": CHUNK}, id="cpu-period", marks=pytest.mark.all
        ),
        pytest.param({**POSIX, "chunk_numel": CHUNK, "host_buffers": 4}, id="posix-stream"),
        pytest.param({**AIO, "residency": "period", "chunk_numel": CHUNK}, id="aio-period", marks=pytest.mark.all),
    ],
)
def test_nothing_grows_over_two_hundred_switches(two_ranks: Any, offload: dict[str, Any], tmp_path: Path) -> None:
    aio_or_skip()
    config = often(tmp_path, offload)
    for early, late in two_ranks.run(watch_growth, config=config, folder=tmp_path, switches=(30, 230), timeout=300.0):
        assert late.pop("memory") - early.pop("memory") < NOISE
        period = offload.get("residency") == "period"
        for name in ("tensors", "device") if period else ():  # the drawn layers' chunks
            assert late.pop(name) <= 2 * early.pop(name)
        assert late == early


RANK_OF_ONE = """
import sys
import torch
from deepspeed import init_distributed
from helpers.live import process_bytes
from helpers.models import ds_config, engine_of, grass_block, tiny_llama, train
init_distributed("gloo", verbose=False)
torch.set_num_threads(1)
sampler = {"sampler": "cyclic", "num_active_layers": 2, "sample_period": 1}
"""

# 8 layers with 7 MB of state each
RSS = """
offload = {"device": sys.argv[1], "nvme_path": sys.argv[2], "io": "posix", "chunk_numel": 65536, "host_buffers": 4}
config = ds_config(dtype="bf16", grass=grass_block(**sampler, offload=offload))
with engine_of(config, tiny_llama(layers=8, hidden=256)) as engine:
    train(engine, 12)
    engine.optimizer.flush()
    state = engine.grass.memory()["optimizer_state"]
    print(process_bytes("VmRSS"), *(state.get(tier, 0) for tier in ("host", "nvme")))
"""


def ranks_of_one(source: str, arguments: list[tuple[Any, ...]], timeout: float = 300.0) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of a process per tuple of arguments, all at the same time."""
    # The C library gives freed memory back only below a threshold, which it raises as it goes unless told otherwise.
    common = {"PYTHONPATH": "tests", "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    environments = [{**rank_environment(0, 1, free_port()), **common} for _ in arguments]
    processes = [
        start_python(RANK_OF_ONE + source, *values, environment=environment)
        for values, environment in zip(arguments, environments, strict=True)
    ]
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.dist
def test_files_take_the_state_out_of_memory(tmp_path: Path) -> None:
    found = ranks_of_one(RSS, [("cpu", tmp_path), ("nvme", tmp_path)])
    assert [code for code, *_ in found] == [0, 0], found
    (on_host, state, _), (in_files, buffers, files) = (map(int, out.splitlines()[-1].split()) for _, out, _ in found)
    assert state > 50e6
    assert files >= state
    assert buffers == 4 * 65536 * STATE
    assert on_host - in_files == pytest.approx(state - buffers, rel=0.1)


# ---- afterwards -----------------------------------------------------------------------------------------------------


def come_and_go(config: dict[str, Any], folder: Path, fail: str = "") -> dict[str, Any]:
    """What an engine leaves behind, or one that could not be built; and what one held meanwhile."""
    held: dict[str, Any] = {}

    def once(number: int) -> None:
        arguments = {"model": tiny_llama(layers=LAYERS), "config": config}
        arguments |= FAILURES[fail](config, number) if fail else {}
        try:
            with engine_of(**arguments, model_parameters=split_groups(arguments["model"])) as engine:
                train(engine, 3)
                held.update(footprint(folder))
        except Exception as error:
            if not fail:
                raise
            held["error"] = f"{type(error).__name__}: {error}"

    once(0)  # what stays for good: libraries, pools of threads, caches
    torch.distributed.barrier()  # the folder is shared: another rank may not be done with its files
    before = footprint(folder)
    for number in range(1, 4):
        once(number)
    deadline = time.monotonic() + 5
    while (after := footprint(folder)) != before and time.monotonic() < deadline:  # threads take a moment to end
        time.sleep(0.01)
    return {"before": before, "after": after, "held": held}


def bad_scheduler(config: dict[str, Any], number: int) -> dict[str, Any]:
    """DeepSpeed finds out when the optimizer has been made."""
    return {"config": {**config, "scheduler": {"type": "NoSuchScheduler", "params": {}}}}


def bad_folder_on_one_rank(config: dict[str, Any], number: int) -> dict[str, Any]:
    """One of the ranks, each in its turn, cannot have its files."""
    good = config["grass"]["offload"]["nvme_path"]
    os.environ["GRASS_TEST_FOLDER"] = "/no/such/folder" if torch.distributed.get_rank() == number % 2 else good
    return {"config": with_offload(config, nvme_path="$GRASS_TEST_FOLDER")}


def other_layers_on_one_rank(config: dict[str, Any], number: int) -> dict[str, Any]:
    """Ranks compare their layers after the files were made."""
    return {"config": config, "model": tiny_llama(layers=LAYERS, hidden=32 + 8 * torch.distributed.get_rank())}


def with_offload(config: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**config, "grass": {**config["grass"], "offload": {**config["grass"]["offload"], **settings}}}


FAILURES: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "scheduler": bad_scheduler,
    "folder": bad_folder_on_one_rank,
    "layers": other_layers_on_one_rank,
}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("residency", "io"),
    tiered(
        itertools.product(["stream", "period"], [POSIX, AIO, {"device": "cpu"}]),
        ("stream", POSIX),
        ("period", AIO),
        ("stream", {"device": "cpu"}),
    ),
)
def test_destroy_gives_everything_back(two_ranks: Any, io: dict[str, Any], residency: str, tmp_path: Path) -> None:
    aio_or_skip()
    config = often(tmp_path, {**io, "residency": residency, "chunk_numel": 1})
    for seen in two_ranks.run(come_and_go, config=config, folder=tmp_path):
        assert seen["after"] == seen["before"]
        if io["device"] == "nvme":
            assert seen["held"]["state files"] > LAYERS
            assert seen["held"]["threads"] > seen["before"]["threads"]
            assert (seen["held"]["locked"] > seen["before"]["locked"]) == (io is AIO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.dist
@pytest.mark.parametrize(
    ("fail", "message"),
    [("scheduler", "NoSuchScheduler"), ("folder", "/no/such/folder"), ("layers", "ranks disagree")],
)
@pytest.mark.parametrize("io", [POSIX, AIO], ids=["posix", "aio"])
def test_a_construction_that_fails_leaves_nothing(
    two_ranks: Any, io: dict[str, Any], fail: str, message: str, tmp_path: Path
) -> None:
    aio_or_skip()
    for seen in two_ranks.run(come_and_go, config=often(tmp_path, io), folder=tmp_path, fail=fail):
        assert message in seen["held"]["error"]
        assert seen["after"] == seen["before"]
        assert (seen["after"]["state files"], seen["after"]["files"]) == (0, 0)
    assert list(tmp_path.iterdir()) == []


# how a process ends that does not destroy its engine -> its exit code
EXITS = {"print('end')": 0, "sys.exit(3)": 3, "raise MemoryError": 1}
EXIT = """
import grass_ds
offload = {"device": "nvme", "nvme_path": sys.argv[1], "io": sys.argv[2], "chunk_numel": 1, "host_buffers": 4}
model = tiny_llama()
config = ds_config(grass=grass_block(**sampler, offload=offload))
engine, *_ = grass_ds.initialize(model=model, config=config, model_parameters=list(model.parameters()))
train(engine, 3)
exec(sys.argv[3])
"""


@pytest.mark.dist
def test_a_process_that_ends_without_destroy_leaves_nothing(tmp_path: Path) -> None:
    aio_or_skip()
    folders = [tmp_path / str(number) for number in range(len(EXITS))]
    for folder in folders:
        folder.mkdir()
    found = ranks_of_one(EXIT, list(zip(folders, ("posix", "aio", "posix"), EXITS, strict=True)))
    assert [code for code, *_ in found] == list(EXITS.values()), found
    assert [list(folder.iterdir()) for folder in folders] == [[]] * len(EXITS)
