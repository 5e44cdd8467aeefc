# SPDX-License-Identifier: Apache-2.0
"""Saving: in the background as at once, nothing seen of it before it is complete, and as large as it has to be."""

import os
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.faults import said
from helpers.models import ds_config, engine_of, grass_block, tiny_llama, train
from helpers.observed import difference, observe

from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint import writer
from grass_ds.checkpoint.part import Part, SummedFile

pytestmark = pytest.mark.dist

HOLD = 0.3


@contextmanager
def gate() -> Iterator[threading.Event]:
    """What background threads write waits while it is closed; it is open at first."""
    passes, write = threading.Event(), SummedFile.write
    passes.set()

    def waiting(self: SummedFile, data: Any) -> int:
        if threading.current_thread().name.startswith("grass_ds checkpoint"):
            assert passes.wait(60)
        return write(self, data)

    with mock.patch.object(SummedFile, "write", waiting):
        try:
            yield passes
        finally:
            passes.set()


def latest(folder: Path) -> str:
    return (folder / "latest").read_text()


def saved_bytes(checkpoint: Path, rank: int) -> int:
    return sum((checkpoint / name).stat().st_size for name in Part.read(checkpoint, rank).files)


def save_and_go_on(config: dict[str, Any], folder: Path, other: dict[str, Any]) -> dict[str, Any]:
    """Save "one" to "four", training on at once; in the background "two" and "four" cannot be written for a while."""
    from deepspeed.utils import logger

    seen: dict[str, Any] = {}
    with gate() as passes, mock.patch.object(logger, "info") as info, engine_of(config) as engine:
        train(engine, 4)
        engine.save_checkpoint(folder, tag="one")
        engine.wait_for_checkpoint()
        train(engine, 1, start=4)

        passes.clear()
        began = time.perf_counter()
        engine.save_checkpoint(folder, tag="two")
        seen["two"] = (engine.grass.checkpoint, time.perf_counter() - began, engine.grass.checkpoint.seconds)
        train(engine, 4, start=5)
        seen["meanwhile"] = ((folder / "two").exists(), latest(folder))
        if other["grass"]["offload"]["device"] == "cpu":
            with engine_of(other, tiny_llama(seed=9)) as second:
                second.load_checkpoint(folder)
                seen["meanwhile"] += (second.global_steps,)
        threading.Timer(HOLD, passes.set).start()
        began = time.perf_counter()
        engine.save_checkpoint(folder, tag="three")
        seen["next"] = (time.perf_counter() - began, engine.grass.checkpoint.stall_seconds, (folder / "two").exists())
        engine.grass.wait_for_checkpoint()
        seen["waited"] = latest(folder)

        passes.clear()
        train(engine, 1, start=9)
        engine.save_checkpoint(folder, tag="four")
        seen["end"] = observe(engine)
        threading.Timer(HOLD, passes.set).start()
    seen["bytes"] = (seen["two"][0].bytes, saved_bytes(folder / "two", engine.global_rank))
    seen["said"] = [str(call.args[0]) for call in info.call_args_list if "checkpoint two" in str(call)]
    return seen


def differing_bytes(one: Path, other: Path) -> int:
    """Between all that two files of torch.save hold, which must be alike in structure."""
    with zipfile.ZipFile(one) as ours, zipfile.ZipFile(other) as theirs:
        names = [name for name in ours.namelist() if not name.endswith("serialization_id")]  # a checksum of the rest
        pairs = [(ours.read(name), theirs.read(name)) for name in names]
        assert ours.namelist() == theirs.namelist()
    return sum(a != b for this, that in pairs if this != that for a, b in zip(this, that, strict=True))


@pytest.mark.parametrize("case", ["zero2-cpu", "zero3-nvme"])
def test_in_the_background_as_at_once(two_ranks: Any, case: str, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    offloads = {
        "cpu": {"device": "cpu"},
        "nvme": {"device": "nvme", "io": "posix", "nvme_path": str(tmp_path / "state")},
    }
    grass = grass_block(num_active_layers=2, offload=offloads[case.split("-")[1]])
    plain = ds_config(dtype="bf16", lr=1e-2, stage=int(case[4]), grass=grass, checkpoint={"async": False})
    background = {**plain, "checkpoint": {"async": True}}
    reports = {}
    for name, config in (("at once", plain), ("background", background)):
        reports[name] = two_ranks.run(save_and_go_on, config=config, folder=tmp_path / name, other=plain)
        assert latest(tmp_path / name) == "four"  # destroy() saw to it
        assert not list((tmp_path / name).glob(".*"))

    # - the same files, whatever became of the state that they are of
    for at_once, later in zip(reports["at once"], reports["background"], strict=True):
        assert difference(at_once["end"], later["end"]) is None
    for tag in ("one", "two", "three", "four"):
        for rank in range(2):
            this, that = (Part.read(tmp_path / name / tag, rank) for name in reports)
            assert this.files.keys() == that.files.keys()
            assert (this.step, this.layout) == (that.step, that.layout)
            for file in this.files:  # they hold the config too
                assert differing_bytes(*(tmp_path / name / tag / file for name in reports)) == 1

    # - what was to be seen of it, and when
    for at_once, later in zip(reports["at once"], reports["background"], strict=True):
        steps = (9,) if "cpu" in case else ()
        assert at_once["meanwhile"] == (True, "two", *(5 for _ in steps))
        assert later["meanwhile"] == (False, "one", *(4 for _ in steps))
        for seen in (at_once, later):
            report, took, _ = seen["two"]
            assert report.tag == "two"
            assert 0 < report.stall_seconds <= took
            assert seen["bytes"][0] == seen["bytes"][1] > 0
            assert seen["waited"] == "three"
        assert at_once["two"][2] <= at_once["two"][0].stall_seconds
        assert later["two"][2] is None  # not written yet
        assert later["two"][0].seconds > later["two"][0].stall_seconds
        took, stalled, published = later["next"]
        assert HOLD * 0.9 < stalled <= took
        assert published
    [at_once] = reports["at once"][0]["said"]
    [later] = reports["background"][0]["said"]
    assert "checkpoint two: training stood still for" in at_once
    assert "MB on this rank" in at_once
    assert "it is being written" in later


# ---- tags -----------------------------------------------------------------------------------------------------------


def save_under_tags(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    from deepspeed import comm

    seen: dict[str, Any] = {}
    with gate() as passes, engine_of(config) as engine:

        def save(**arguments: Any) -> tuple[str, list[str]]:
            """Train a step and save; what ``latest`` says then, and which folders there are."""
            train(engine, 1, start=engine.global_steps)
            engine.save_checkpoint(folder, **arguments)
            engine.wait_for_checkpoint()
            names = sorted(path.name for path in folder.iterdir() if path.is_dir())
            comm.barrier()
            return latest(folder), names

        seen["number"] = save(tag=7)
        seen["again"] = (*save(tag=7, client_state={"answer": 3}), folders.step_of(folder / "7"))
        seen["none"] = save()
        seen["aside"] = save(tag="x", save_latest=False)
        seen["apart"] = said(lambda: engine.save_checkpoint(folder, tag=f"rank{engine.global_rank}"))
        if engine.global_rank == 0:  # killed attempts
            (folder / ".saving.old" / "more").mkdir(parents=True)
            (folder / ".replaced.7").mkdir()
            (folder / "x").rename(folder / ".replaced.x")
        comm.barrier()
        seen["after others"] = save(tag="y")
        _, client = engine.load_checkpoint(folder, tag=7)
        seen["client"] = (client["answer"], engine.global_steps)
        engine.load_checkpoint(folder, tag="x")
        seen["restored"] = (engine.global_steps, (folder / "x").exists())

        home = Path.cwd()
        os.chdir(folder)
        passes.clear()
        engine.save_checkpoint("out", tag="here")
        os.chdir(home)
        passes.set()
        engine.wait_for_checkpoint()
        seen["relative"] = latest(folder / "out")
    return seen


def test_a_tag_names_the_folder_of_a_checkpoint(two_ranks: Any, tmp_path: Path) -> None:
    config = ds_config(grass=grass_block(), checkpoint={"async": True})
    for seen in two_ranks.run(save_under_tags, config=config, folder=tmp_path):
        assert seen["number"] == ("7", ["7"])
        assert seen["again"] == ("7", ["7"], 2)
        assert seen["none"] == ("global_step3", ["7", "global_step3"])
        assert seen["aside"] == ("global_step3", ["7", "global_step3", "x"])
        assert seen["apart"].startswith("ValueError: rank 0 saves a checkpoint to ")
        assert f"{tmp_path / 'rank1'}; call save_checkpoint() with the same save_dir and tag" in seen["apart"]
        assert seen["after others"] == ("y", [".replaced.x", "7", "global_step3", "y"])
        assert seen["client"] == (3, 2)
        assert seen["restored"] == (4, True)
        assert seen["relative"] == "here"  # a relative save_dir is of the working directory of the call


# ---- size -----------------------------------------------------------------------------------------------------------


def save_sized(config: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Save; how many elements the model has, and how many ever had a state. All ranks together."""
    with engine_of(config, tiny_llama(hidden=128)) as engine:
        train(engine, 6)
        engine.save_checkpoint(folder, tag="here")
        trained = ("model.norm.", *(f"model.layers.{i}." for i, visits in enumerate(engine.grass.visits) if visits))
        sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    return sum(sizes.values()), sum(numel for name, numel in sizes.items() if name.startswith(trained))


@pytest.mark.parametrize("stage", [2, 3])
def test_layers_that_were_never_drawn_have_no_moments_on_disk(two_ranks: Any, stage: int, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", stage=stage, grass=grass_block())
    (numel, trained), _ = two_ranks.run(save_sized, config=config, folder=tmp_path)
    assert 0 < trained < 0.6 * numel

    def size(pattern: str) -> int:
        return sum(path.stat().st_size for path in (tmp_path / "here").glob(pattern))

    assert size("*optim_states.pt") == pytest.approx(4 * numel + 8 * trained, abs=0.12 * numel)
    weights = 2 * numel if stage == 2 else 0  # ZeRO-3 has them in the optimizer's files alone
    assert size("*model_states.pt") == pytest.approx(weights, abs=0.14 * numel)
    assert size("grass_rank_*.json") < 0.01 * size("*")


# ---- what goes wrong behind the caller's back -----------------------------------------------------------------------


def lose_and_save_again(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Rank 1 cannot write "lost" in the background, and the engine is destroyed; the next engine saves "lost", too."""
    from deepspeed import comm as dist
    from deepspeed.utils import logger

    seen: dict[str, Any] = {}

    def broken(self: SummedFile, data: Any) -> int:
        raise OSError("no room")

    write = broken if dist.get_rank() == 1 else SummedFile.write
    with (
        mock.patch.object(SummedFile, "write", write),
        mock.patch.object(writer, "LAST_PART_TIMEOUT", 0.2),
        mock.patch.object(logger, "error") as error,
    ):
        with engine_of(config) as engine:
            train(engine, 2)
            engine.save_checkpoint(folder, tag="lost")
            began = time.perf_counter()
        seen["end"], seen["errors"] = time.perf_counter() - began, [str(call.args[0]) for call in error.call_args_list]
    dist.barrier()
    seen["left"] = sorted(path.name for path in folder.iterdir() if path.is_dir())
    dist.barrier()
    with engine_of(config) as engine:
        engine.save_checkpoint(folder, tag="lost")
        engine.wait_for_checkpoint()
        seen["saved"] = engine.load_checkpoint(folder)[0] is not None
    return seen


def test_a_save_that_fails_unseen_is_told_and_leaves_nothing(two_ranks: Any, tmp_path: Path) -> None:
    config = ds_config(grass=grass_block(), checkpoint={"async": True})
    for report in two_ranks.run(lose_and_save_again, config=config, folder=tmp_path):
        assert report["end"] < 20
        [error] = report["errors"]
        assert "will not be published" in error
        assert report["left"] == []
        assert report["saved"]
