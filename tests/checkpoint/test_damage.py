# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were damaged, cut off at any point, or written to a disk that is full or read-only."""

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.disks import mounted
from helpers.faults import said
from helpers.models import ds_config, engine_of, grass_block, tiny_llama, train
from helpers.observed import difference, observe

pytestmark = pytest.mark.dist

OLD, NEW = "step2", "step4"
OPTIM = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"


# ---- damaged files --------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit in the middle: of a part, in a digit of the first checksum."""
    content = bytearray(path.read_bytes())
    position = content.index(b'"crc32": ') + len(b'"crc32": 1') if path.suffix == ".json" else len(content) // 2
    content[position] ^= 1
    path.write_bytes(content)


def lose(path: Path) -> None:
    path.unlink()


DAMAGES: tuple[Callable[[Path], None], ...] = (truncate, flip, lose)


@contextmanager
def damaged(path: Path, damage: Callable[[Path], None]) -> Iterator[None]:
    """On rank 0's word, for all ranks."""
    from deepspeed import comm as dist

    content = path.read_bytes()
    dist.barrier()
    if dist.get_rank() == 0:
        damage(path)
    dist.barrier()
    try:
        yield
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            path.write_bytes(content)
        dist.barrier()


@contextmanager
def warnings_of_library() -> Iterator[list[str]]:
    from deepspeed.utils import logger

    texts: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield texts
    finally:
        logger.removeHandler(handler)


def load_damaged(config: dict[str, Any], folder: Path, names: list[str]) -> dict[str, Any]:
    """(file, damage) -> messages of loading with and without the tag, and whether the run fell back to the step before."""
    with engine_of(config) as engine:
        seen = {}
        for tag in (OLD, NEW):
            train(engine, 2, start=engine.global_steps)
            engine.save_checkpoint(folder, tag=tag)
            seen[tag] = observe(engine)
    report = {}
    with engine_of(config, tiny_llama(seed=9)) as engine:
        for name in names:
            for damage in DAMAGES:
                engine.load_checkpoint(folder, tag=OLD)
                train(engine, 1, start=2)
                before = observe(engine)
                with damaged(folder / NEW / name, damage), warnings_of_library() as warned:
                    error = said(lambda: engine.load_checkpoint(folder, tag=NEW))
                    touched = difference(before, observe(engine))
                    path, _ = engine.load_checkpoint(folder)
                    fallen = difference(seen[OLD], observe(engine))
                report[name, damage.__name__] = {
                    "error": error,
                    "touched": touched,
                    "path": Path(path).parent.name,
                    "fallen": fallen,
                    "warned": [text for text in warned if "grass_ds" in text],
                }
        path, _ = engine.load_checkpoint(folder)
        whole = difference(seen[NEW], observe(engine))
    return {"damaged": report, "whole": whole}


@pytest.mark.parametrize("stage", [2, 3])
def test_damaged_files_are_told_and_passed_over(two_ranks: Any, stage: int, tmp_path: Path) -> None:
    weights = "mp_rank_00_model_states.pt" if stage == 2 else "zero_pp_rank_1_mp_rank_00_model_states.pt"
    names = [weights, OPTIM, "grass_rank_0.json", "grass_rank_1.json"]
    config = ds_config(dtype="bf16", stage=stage, grass=grass_block(sampler="grass"))
    reports = two_ranks.run(load_damaged, config=config, folder=tmp_path, names=names)
    for rank, report in enumerate(reports):
        assert report["whole"] is None
        assert len(report["damaged"]) == len(names) * len(DAMAGES)
        for (name, damage), found in report["damaged"].items():
            assert found["error"].startswith("ValueError: "), (name, damage, found)
            assert name in found["error"] and OLD in found["error"], (name, damage, found)
            assert found["touched"] is found["fallen"] is None, (name, damage, found)
            assert found["path"] == OLD, (name, damage, found)
            assert len(found["warned"]) == (rank == 0), (name, damage, found)
            if rank == 0:
                assert name in found["warned"][0], (name, damage, found)
                assert f"{OLD} (step 2) is used instead" in found["warned"][0], (name, damage, found)


def load_by_latest(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What ``latest`` says -> the checkpoint that is loaded; then without any checkpoint that could be."""
    from deepspeed import comm as dist

    report: dict[str, Any] = {}
    with engine_of(config) as engine:
        for tag in (OLD, NEW):
            train(engine, 2, start=engine.global_steps)
            engine.save_checkpoint(folder, tag=tag)
        for content in (OLD, "", "step99", None):
            dist.barrier()
            if dist.get_rank() == 0:
                (folder / "latest").unlink() if content is None else (folder / "latest").write_text(content)
            dist.barrier()
            path, _ = engine.load_checkpoint(folder)
            report[str(content)] = Path(path).parent.name
        dist.barrier()
        if dist.get_rank() == 0:
            for tag in (OLD, NEW):
                truncate(folder / tag / OPTIM)
        dist.barrier()
        report["all"] = said(lambda: engine.load_checkpoint(folder))
    return report


def test_a_lost_or_wrong_latest_is_no_loss(two_ranks: Any, tmp_path: Path) -> None:
    config = ds_config(dtype="bf16", grass=grass_block())
    for report in two_ranks.run(load_by_latest, config=config, folder=tmp_path):
        everything = report.pop("all")
        assert report == {OLD: OLD, "": NEW, "step99": NEW, "None": NEW}
        assert everything.startswith("ValueError: ")
        assert OLD in everything and NEW in everything and OPTIM in everything


# ---- disks that are full or read-only -------------------------------------------------------------------------------

PAGE = 4096  # what a disk in memory is given out in
# How much of what a checkpoint takes is left: nothing, some, all but its last file, all but the new ``latest``.
ROOMS = {"nothing": (0.0, 0), "half": (0.5, 0), "all but a file": (1.0, -PAGE), "all but latest": (1.0, 0)}


@contextmanager
def on_rank_0(before: Callable[[], Any], after: Callable[[], Any]) -> Iterator[None]:
    """What rank 0 does for all of them."""
    from deepspeed import comm as dist

    for action in (before, after):
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()
        if action is before:
            yield


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def room_of(checkpoint: Path) -> int:
    """Bytes that it takes on a disk in memory."""
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in checkpoint.iterdir())


def leave(room: int, disk: Path) -> None:
    """Take all of a disk but so many bytes."""
    free = os.statvfs(disk)
    (disk / "others").write_bytes(bytes(free.f_bavail * free.f_frsize - room))


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def save_in_vain(engine: Any, folder: Path) -> dict[str, Any]:
    """Train a step from the checkpoint that is there, try to save, and see that the one before is as it was."""
    from deepspeed import comm as dist

    before = files_in(folder)
    train(engine, 1, start=engine.global_steps)
    stepped = observe(engine)
    error = said(lambda: engine.save_checkpoint(folder, tag="step3")) or said(engine.wait_for_checkpoint)
    dist.barrier()  # rank 0 has cleared up
    moved = difference(stepped, observe(engine))
    after = files_in(folder) if folder.exists() else {}
    changed = sorted(name for name in before if before[name] != after.get(name))
    engine.load_checkpoint(folder.parent / "run")
    left = sorted(path.name for path in folder.glob(".saving*"))
    return {"error": error, "moved": moved, "changed": changed, "left": left, "state": observe(engine)}


def survive_disks(config: dict[str, Any], disk: Path) -> dict[str, Any]:
    folder, seen, report = disk / "run", {}, {}
    with engine_of(config) as engine:
        train(engine, 6, after_step=lambda step: seen.update({step + 1: observe(engine)}))
    with engine_of(config) as engine:
        train(engine, 2)
        engine.save_checkpoint(folder, tag=OLD)
        train(engine, 1, start=2)
        engine.save_checkpoint(folder, tag="measure", save_latest=False)
        engine.wait_for_checkpoint()
        needed = room_of(folder / "measure")
        engine.load_checkpoint(folder)
        with on_rank_0(partial(shutil.rmtree, folder / "measure"), lambda: None):
            pass
        for name, (share, more) in ROOMS.items():
            room = int(needed * share) + more
            with on_rank_0(partial(leave, room, disk), (disk / "others").unlink):
                report[name] = save_in_vain(engine, folder)
        with on_rank_0(partial(leave, 0, disk), (disk / "others").unlink):
            report["nothing, first save"] = save_in_vain(engine, disk / "first")
        with on_rank_0(partial(remount, disk, "ro"), partial(remount, disk, "rw")):
            report["read-only"] = save_in_vain(engine, folder)
        for attempt in report.values():
            attempt["state"] = difference(seen[2], attempt["state"])
        train(engine, 4, start=2)
        engine.save_checkpoint(folder, tag="step6")
    with engine_of(config, tiny_llama(seed=9)) as engine:
        path, _ = engine.load_checkpoint(folder)
        end = difference(seen[6], observe(engine))
    return {"attempts": report, "saved": Path(path).parent.name, "end": end, "left": sorted(folder.glob(".*"))}


@pytest.mark.parametrize("background", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("stage", [2, 3])
def test_disks_that_take_no_more(two_ranks: Any, stage: int, background: bool, tmp_path: Path) -> None:
    asynchronous = {"checkpoint": {"async": True}} if background else {}
    config = ds_config(dtype="bf16", stage=stage, grass=grass_block(sampler="grass"), **asynchronous)
    with mounted(tmp_path / "disk", 8 << 20) as disk:
        reports = two_ranks.run(survive_disks, config=config, disk=disk, timeout=240.0)
    for report in reports:
        for name, attempt in report["attempts"].items():
            reason = "Read-only file system" if name == "read-only" else "No space left on device"
            assert attempt["error"].startswith(("OSError: ", "RankFailedError: ")), (name, attempt)
            assert reason in attempt["error"], (name, attempt)
            assert attempt["moved"] is attempt["state"] is None, (name, attempt)
            assert attempt["changed"] == attempt["left"] == [], (name, attempt)
        assert len(report["attempts"]) == len(ROOMS) + 2
        assert report["saved"] == "step6"
        assert report["end"] is None
        assert report["left"] == []
