# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that were damaged, cut off at any point, or written to a disk that is full or read-only."""

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
from helpers.observed import difference, logged, observe

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


@contextmanager
def on_rank_0(before: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """What rank 0 does for all of them."""
    from deepspeed import comm as dist

    for action in (before, after):
        dist.barrier()
        if dist.get_rank() == 0:
            action()
        dist.barrier()
        if action is before:
            yield


def load_damaged(config: dict[str, Any], folder: Path, damages: list[tuple[str, Any]]) -> dict[str, Any]:
    """What loading makes of each damage, with and without the tag; then of a ``latest`` that is wrong or lost."""
    with engine_of(config) as engine:
        seen = {}
        for tag in (OLD, NEW):
            train(engine, 2, start=engine.global_steps)
            engine.save_checkpoint(folder, tag=tag)
            seen[tag] = observe(engine)
    report: dict[str, Any] = {"damaged": {}, "latest": {}}
    with engine_of(config, tiny_llama(seed=9)) as engine:

        def load() -> str:
            path, _ = engine.load_checkpoint(folder)
            return Path(path).parent.name

        for name, damage in damages:
            engine.load_checkpoint(folder, tag=OLD)
            train(engine, 1, start=2)
            before, path = observe(engine), folder / NEW / name
            restore = partial(path.write_bytes, path.read_bytes())
            with on_rank_0(partial(damage, path), restore), logged("grass_ds") as warned:
                report["damaged"][name, damage.__name__] = {
                    "error": said(lambda: engine.load_checkpoint(folder, tag=NEW)),
                    "touched": difference(before, observe(engine)),
                    "used": load(),
                    "fallen": difference(seen[OLD], observe(engine)),
                    "warned": warned,
                }
        load()
        report["whole"] = difference(seen[NEW], observe(engine))
        latest = folder / "latest"
        for content in (OLD, "", "step99", None):
            with on_rank_0(latest.unlink if content is None else partial(latest.write_text, content)):
                report["latest"][str(content)] = load()
        with on_rank_0(lambda: [truncate(folder / tag / OPTIM) for tag in (OLD, NEW)]):
            report["all"] = said(lambda: engine.load_checkpoint(folder))
    return report


@pytest.mark.parametrize("stage", [2, 3])
def test_damaged_files_are_told_and_passed_over(two_ranks: Any, stage: int, tmp_path: Path) -> None:
    """Each kind of file and each damage, not each pair: which damage is found in which file is in test_folder.py."""
    weights = "mp_rank_00_model_states.pt" if stage == 2 else "zero_pp_rank_1_mp_rank_00_model_states.pt"
    first, second = "grass_rank_0.json", "grass_rank_1.json"
    damages = [(weights, truncate), (OPTIM, flip), (OPTIM, lose), (first, truncate), (first, lose), (second, flip)]
    config = ds_config(dtype="bf16", stage=stage, grass=grass_block(sampler="grass"))
    for rank, report in enumerate(two_ranks.run(load_damaged, config=config, folder=tmp_path, damages=damages)):
        assert report["whole"] is None
        assert len(report["damaged"]) == len(damages)
        for (name, damage), found in report["damaged"].items():
            assert found["error"].startswith("ValueError: "), (name, damage, found)
            assert name in found["error"], (name, damage, found)
            assert found["error"].endswith(f"; load another: {OLD}"), (name, damage, found)
            assert found["touched"] is found["fallen"] is None, (name, damage, found)
            assert found["used"] == OLD, (name, damage, found)
            assert len(found["warned"]) == (rank == 0), (name, damage, found)
            for warning in found["warned"]:
                assert name in warning and f"{OLD} (step 2) is used instead" in warning, (name, damage, found)
        assert report["latest"] == {OLD: OLD, "": NEW, "step99": NEW, "None": NEW}
        assert report["all"].startswith("ValueError: ")
        assert all(text in report["all"] for text in (OLD, NEW, OPTIM))


# ---- disks that are full or read-only -------------------------------------------------------------------------------

PAGE = 4096  # what a disk in memory is given out in
# How much of what a checkpoint takes is left: nothing, some, all but its last file, all but the new ``latest``.
ROOMS = {"nothing": (0.0, 0), "half": (0.5, 0), "all but a file": (1.0, -PAGE), "all but latest": (1.0, 0)}


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
        with on_rank_0(partial(shutil.rmtree, folder / "measure")):
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


@pytest.mark.parametrize(("stage", "background"), [(2, False), (3, True)], ids=["zero2 at once", "zero3 background"])
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
