# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: complete or invisible at every step of a publication, and judged by what their parts say."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint.part import FileSum, Part, SummedFile
from grass_ds.core.durable_files import sync_folder

WORLD = 2


@pytest.fixture(autouse=True)
def fsync() -> Iterator[mock.Mock]:
    """Nothing here loses power, and waiting for the disk is most of the time."""
    with mock.patch.object(os, "fsync") as fsync:
        yield fsync


def fill(folder: Path, tag: str, step: int) -> None:
    """Prepare a checkpoint and write all its files."""
    folders.prepare(folder, tag)
    aside = folders.saving_path(folder, tag)
    for rank in range(WORLD):
        part = Part(rank, WORLD, 2, step)
        with SummedFile(aside / f"rank{rank}.pt") as file:
            file.write(f"{step} of rank {rank}".encode())
        part.files[f"rank{rank}.pt"] = file.sums
        part.write(aside)


def save(folder: Path, tag: str, step: int, latest: bool = True) -> Path:
    fill(folder, tag, step)
    folders.publish(folder, tag, latest)
    return folder / tag


def is_whole(checkpoint: Path) -> bool:
    folders.restore_replaced(checkpoint)
    return not folders.problems(checkpoint)


def loadable(folder: Path) -> tuple[str, int]:
    """Tag and step of what a run would go on from. It is whole."""
    tag = next(tag for tag in folders.candidates(folder) if is_whole(folder / tag))
    assert folders.corrupt(folder / tag) == []
    step = folders.step_of(folder / tag)
    assert step is not None
    assert (folder / tag / "rank1.pt").read_text() == f"{step} of rank 1"
    return tag, step


# ---- publication ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing of the process runs after it."""


@contextmanager
def killed_before(count: int) -> Iterator[None]:
    """Be killed before the ``count``-th change of the file system."""
    left = count

    def guard(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:
                raise Killed
            return real(*args, **kwargs)

        return call

    def half(path: Path, **_: Any) -> None:
        """Removing a tree is no single change."""
        nonlocal left
        for item in sorted(path.iterdir()):
            guard(os.unlink)(item)
        guard(os.rmdir)(path)

    changes = [(os, name) for name in ("rename", "replace", "fsync", "mkdir")]
    with mock.patch.object(shutil, "rmtree", lambda path, **_: half(path) if path.exists() else None):
        patches = [mock.patch.object(module, name, guard(getattr(module, name))) for module, name in changes]
        for patch in patches:
            patch.start()
        try:
            yield
        except Killed:
            folders._being_written.clear()  # it was this process that knew
        finally:
            for patch in patches:
                patch.stop()


@pytest.mark.parametrize("tag", ["new", "old"])
def test_whenever_it_is_killed_the_old_checkpoint_or_the_new_one_is_there(tag: str, tmp_path: Path) -> None:
    found = []
    for count in range(1, 100):
        folder = tmp_path / str(count)
        save(folder, "older", 1)
        save(folder, "old", 2)
        with killed_before(count):
            save(folder, tag, 3)
            found.append("end")
        if found[-1:] == ["end"]:
            break
        found.append(loadable(folder)[1])
        assert (folder / (folder / "latest").read_text()).is_dir()  # tools of others go by it alone
        save(folder, "next", 4)  # whatever was left behind
        assert loadable(folder) == ("next", 4)
        assert {path.name for path in folder.iterdir()} - {tag} == {"older", "old", "next", "latest"} - {tag}
    assert loadable(folder) == (tag, 3)
    steps = found[:-1]
    assert set(steps) == {2, 3}  # kills before and after it could be seen
    assert steps == sorted(steps)
    assert len(steps) > 15


def test_what_a_cut_off_replacement_moved_away_comes_back(tmp_path: Path) -> None:
    os.rename(save(tmp_path, "one", 1), tmp_path / ".replaced.one")
    folders.prepare(tmp_path, "two")  # must not take it for litter
    assert loadable(tmp_path) == ("one", 1)


def test_a_tag_may_name_a_folder_in_a_folder(tmp_path: Path) -> None:
    save(tmp_path, "runs/one", 1)
    assert (tmp_path / "latest").read_text() == "runs/one"
    assert loadable(tmp_path) == ("runs/one", 1)
    assert not list(tmp_path.rglob(".*"))


# ---- parts and what they tell ---------------------------------------------------------------------------------------


def test_a_part_is_read_as_it_was_written_and_others_can_read_it(tmp_path: Path) -> None:
    part = Part(1, 2, 3, 40, {"a.pt": FileSum(5, 6)}, [["model.layers.0", [["model.layers.0.weight", [2, 3]]]]])
    part.write(tmp_path)
    assert Part.read(tmp_path, 1) == part
    content = json.loads((tmp_path / "grass_rank_1.json").read_text())
    assert content["files"] == {"a.pt": {"bytes": 5, "crc32": 6}}
    assert (content["rank"], content["world_size"], content["zero_stage"], content["step"]) == (1, 2, 3, 40)
    with pytest.raises(ValueError, match=r"grass_rank_0\.json is missing"):
        Part.read(tmp_path, 0)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"rank": 0, "wor', b"[]", b"7", b"\xff\xfe", b'{"rank": 0, "files": {"a": 3}}', b'{"files": {}}'],
)
def test_a_part_that_cannot_be_understood_is_named(content: bytes, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "one", 1)
    (checkpoint / "grass_rank_0.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"grass_rank_0\.json cannot be read"):
        Part.read(checkpoint, 0)
    assert folders.step_of(checkpoint) is None
    [problem] = folders.problems(checkpoint)
    assert problem.startswith("grass_rank_0.json cannot be read")
    assert folders.corrupt(checkpoint) == []


def test_what_is_missing_or_cut_off_is_found_without_reading_it(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "one", 1)
    assert folders.problems(checkpoint) == folders.corrupt(checkpoint) == []
    os.truncate(checkpoint / "rank0.pt", 5)
    (checkpoint / "rank1.pt").unlink()
    assert folders.problems(checkpoint) == ["rank0.pt has 5 of 11 bytes", "rank1.pt is missing"]
    (checkpoint / "grass_rank_1.json").unlink()
    assert folders.problems(checkpoint) == ["rank0.pt has 5 of 11 bytes", "grass_rank_1.json is missing"]
    (checkpoint / "grass_rank_0.json").unlink()
    assert folders.problems(checkpoint) == []  # nothing says any more that it is one of ours
    assert folders.problems(tmp_path / "two") == ["two is not there"]


def test_changed_content_is_found_by_the_rank_that_is_asked_to_read_it(tmp_path: Path) -> None:
    checkpoint, changed = save(tmp_path, "one", 1), ["rank1.pt is not what was written (checksum)"]
    (checkpoint / "rank1.pt").write_text("1 of rank 7")
    assert folders.problems(checkpoint) == folders.corrupt(checkpoint, [0]) == []
    assert folders.corrupt(checkpoint, [1]) == folders.corrupt(checkpoint) == changed
    (checkpoint / "rank1.pt").unlink()
    assert folders.corrupt(checkpoint) == ["rank1.pt is missing"]


def test_parts_of_two_checkpoints_are_no_checkpoint(tmp_path: Path) -> None:
    old, new = save(tmp_path, "one", 1), save(tmp_path, "two", 2)
    for name in ("rank1.pt", "grass_rank_1.json"):
        shutil.copy(old / name, new / name)
    assert folders.problems(old) == folders.corrupt(new) == []
    assert folders.problems(new) == ["grass_rank_1.json is of another checkpoint"]


def test_what_cannot_be_read_is_damage_and_not_an_error(tmp_path: Path) -> None:
    checkpoint = save(tmp_path, "one", 1)
    (checkpoint / "grass_rank_1.json").unlink()
    (checkpoint / "grass_rank_1.json").mkdir()
    assert "cannot be read" in folders.problems(checkpoint)[0]
    (tmp_path / "empty").mkdir()
    assert folders.problems(tmp_path / "empty") == ["empty is empty"]
    assert "cannot be looked into" in folders.problems(tmp_path / ("x" * 300))[0]
    for content in (b"", b"\xff\xfe\xfa"):
        (tmp_path / folders.LATEST).write_bytes(content)
        assert folders.candidates(tmp_path) == ["one"]


@pytest.mark.parametrize("tag", ["", ".", "..", "../up", "/absolute", ".hidden", "a/.hidden"])
def test_tags_that_name_no_folder_below_are_refused(tag: str) -> None:
    with pytest.raises(ValueError, match="expected the name of a folder to make in save_dir"):
        folders.check_tag(tag)
    folders.check_tag("epoch1/global_step5")


def test_candidates_are_the_latest_and_then_the_newest(tmp_path: Path) -> None:
    assert folders.candidates(tmp_path) == []
    for tag, step in (("b", 20), ("c", 5), ("a", 10)):
        save(tmp_path, tag, step)
    (tmp_path / "c" / "grass_rank_0.json").write_text("{")
    fill(tmp_path, "d", 99)  # not published
    (tmp_path / "checkpoint-of-others").mkdir()
    assert folders.candidates(tmp_path) == ["a", "b", "c"]
    (tmp_path / "latest").write_text("gone\n")
    assert folders.candidates(tmp_path) == ["gone", "b", "a", "c"]


# ---- files that know their sum --------------------------------------------------------------------------------------


def test_a_file_knows_its_sum_and_is_synced(tmp_path: Path, fsync: mock.Mock) -> None:
    content = {"a": torch.arange(5000.0), "b": [1, 2]}
    with SummedFile(tmp_path / "file.pt") as file:
        torch.save(content, file)  # type: ignore[arg-type]
    fsync.assert_called_once()
    assert torch.equal(torch.load(tmp_path / "file.pt")["a"], content["a"])
    written = (tmp_path / "file.pt").read_bytes()
    assert file.sums == FileSum(len(written), zlib.crc32(written))


def test_the_first_error_of_a_file_is_kept_and_nothing_is_called_written(fsync: mock.Mock) -> None:
    file = SummedFile(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left") as caught, file:
        file.write(bytes(1 << 20))
    assert file.error is caught.value
    assert file.sums == FileSum(0, 0)
    with pytest.raises(OSError, match="No space left"), SummedFile(Path("/dev/full")) as file:
        file.write(b"12345")  # fails when it is flushed
    fsync.assert_not_called()


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_file_systems_that_do_not_sync_folders_will_do(number: int, fails: bool, tmp_path: Path) -> None:
    fsync = os.fsync

    def of_files_only(handle: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    with mock.patch.object(os, "fsync", of_files_only):
        if fails:
            with pytest.raises(OSError, match=os.strerror(number)):
                save(tmp_path, "one", 1)
        else:
            save(tmp_path, "one", 1)
            assert folders.candidates(tmp_path) == ["one"]


def test_a_folder_that_may_not_be_read_is_passed_over(tmp_path: Path) -> None:
    def refused(path: object, flags: int) -> int:
        raise PermissionError(errno.EACCES, "no")

    with mock.patch.object(os, "open", refused):
        sync_folder(tmp_path)
