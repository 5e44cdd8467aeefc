# SPDX-License-Identifier: Apache-2.0
"""State files: made whole or not at all, taken by one job at a time, and what is said when the disk is wrong."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest
from deepspeed.utils import logger
from helpers.disks import mounted, start_python

from grass_ds.config import GrassConfigError
from grass_ds.offload.state_files import ALIGNMENT, OffloadError, StateFiles, resolve_path

MB = 2**20
SIZES = {"model.layers.3/0": 5 * ALIGNMENT, "model.layers.3_0": ALIGNMENT, "head/1": MB}


@contextmanager
def state_files(root: Path, rank: int = 0, job: str = "job 7", sizes: dict[str, int] = SIZES) -> Iterator[StateFiles]:
    files = StateFiles(root, rank, job, sizes)
    try:
        yield files
    finally:
        files.close()


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What DeepSpeed's logger says, which does not propagate."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger.name)
    return caplog


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(root: Path, sizes: dict[str, int] = SIZES) -> str:
    """The reason why no state files can be made there."""
    with pytest.raises(GrassConfigError) as error, state_files(root, sizes=sizes):
        pass
    return str(error.value)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_every_unit_has_a_file_of_its_own_whose_blocks_are_reserved(tmp_path: Path) -> None:
    with state_files(tmp_path) as files:
        found = [files[name] for name in SIZES]
        assert len({file.path for file in found}) == len({file.fd for file in found}) == len(SIZES)
        for file, (name, size) in zip(found, SIZES.items(), strict=True):
            status = file.path.stat()
            assert (file.path.name, file.nbytes, status.st_size) == (f"{quote(name, safe='')}.state", size, size)
            assert status.st_blocks * 512 >= size
            assert file.path.parent == tmp_path / "grass_ds_rank0"
        assert files.nbytes == sum(SIZES.values())


def test_close_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    with state_files(tmp_path) as files:
        descriptors = [files[name].fd for name in SIZES]
        files["head/1"].path.unlink()  # by somebody else
        files.close()
        assert list(tmp_path.iterdir()) == []
        for fd in descriptors:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)


def test_a_fork_that_closes_them_does_not_remove_its_parents_files(tmp_path: Path) -> None:
    with state_files(tmp_path) as files:
        child = os.fork()
        if child == 0:
            files.close()
            os._exit(0)
        os.waitpid(child, 0)
        assert all(files[name].path.exists() for name in SIZES)
        assert "job 7" in refused(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_can_be_added_later(tmp_path: Path) -> None:
    with state_files(tmp_path) as files:
        files.add("late", 2 * ALIGNMENT)
        late = files["late"]
        files.add("late", 2 * ALIGNMENT)
        assert files["late"] is late
        assert files.nbytes == sum(SIZES.values()) + 2 * ALIGNMENT
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_file_is_found_and_a_deleted_one_is_as_good_as_before(tmp_path: Path) -> None:
    with state_files(tmp_path) as files:
        file = files["head/1"]
        file.path.unlink()
        file.check()
        os.truncate(f"/proc/self/fd/{file.fd}", MB // 2)
        with pytest.raises(OffloadError, match=rf"{file.path.name} has {MB // 2} bytes instead of {MB}"):
            file.check()


# ---- disks ----------------------------------------------------------------------------------------------------------


def test_a_missing_directory_is_not_created(tmp_path: Path) -> None:
    missing = tmp_path / "not mounted"
    assert "no such directory" in refused(missing)
    assert not missing.exists()
    (tmp_path / "file").touch()
    assert "no such directory" in refused(tmp_path / "file")


def test_a_directory_that_cannot_be_written() -> None:
    assert 'nvme_path = "/proc"' in refused(Path("/proc"))


def test_a_read_only_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", MB, "ro") as disk:
        assert "Read-only file system" in refused(disk)


def test_too_little_space_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 4 * MB) as disk:
        reason = refused(disk, {"large": 10**9 // ALIGNMENT * ALIGNMENT})
        assert (
            "needs 1.000 GB" in reason and "0.004 GB are free" in reason and 'grass.offload.device = "cpu"' in reason
        )
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 4 * MB) as disk, state_files(disk) as files:
        with pytest.raises(GrassConfigError, match="No space left on device") as error:
            files.add("large", 4 * MB)
        assert f"{(files.nbytes + 4 * MB) / 1e9:.3f} GB" in str(error.value)
        assert len(os.listdir(disk / "grass_ds_rank0")) == len(SIZES)
        files["head/1"].check()


def test_construction_that_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    with file_size_limit(MB):
        reason = refused(tmp_path, {"fits": MB, "does not": 2 * MB})
    assert "File too large" in reason and "0.003 GB" in reason
    assert list(tmp_path.iterdir()) == []


def test_memory_is_no_disk(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    with mounted(tmp_path / "disk", 4 * MB) as disk, state_files(disk):
        assert "takes RAM" in messages.text


# ---- the lock -------------------------------------------------------------------------------------------------------


def test_a_second_job_is_refused_and_told_who_was_first(tmp_path: Path) -> None:
    with state_files(tmp_path, job="job 7"):
        reason = refused(tmp_path)
        assert "job 7" in reason and str(os.getpid()) in reason and "$SLURM_JOB_ID" in reason
        with state_files(tmp_path, rank=1) as other:
            assert other["head/1"].path.parent.name == "grass_ds_rank1"
        assert "job 7" in (tmp_path / "grass_ds_rank0.lock").read_text()
    with state_files(tmp_path, job="job 8"):
        pass


def test_what_a_killed_process_left_is_replaced(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    source = """
import sys, time
from pathlib import Path
from grass_ds.offload.state_files import ALIGNMENT, StateFiles
files = StateFiles(Path(sys.argv[1]), 0, "killed", {"old": ALIGNMENT, "head/1": ALIGNMENT})
print("ready", flush=True)
time.sleep(60)
"""
    process = start_python(source, tmp_path)
    assert process.stdout is not None and any("ready" in line for line in process.stdout)
    assert "killed" in refused(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "grass_ds_rank0" / "old.state").exists()
    with state_files(tmp_path) as files:
        assert "2 state files that an earlier run left behind" in messages.text
        files["head/1"].check()
        assert not (tmp_path / "grass_ds_rank0" / "old.state").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_removed_while_it_was_waited_for_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process opens the lock file; its holder removes it; a third makes a new one: only that one is a lock."""
    from grass_ds.offload import state_files as module

    first = StateFiles(tmp_path, 0, "first", {"unit": ALIGNMENT})
    flock, opened = module.fcntl.flock, []

    def slow_flock(fd: int, operation: int) -> None:
        if not opened:  # the second has opened the path and is about to lock it
            opened.append(fd)
            first.close()
            opened.append(StateFiles(tmp_path, 0, "third", {"unit": ALIGNMENT}))
        flock(fd, operation)

    monkeypatch.setattr(module.fcntl, "flock", slow_flock)
    assert "third" in refused(tmp_path)
    opened[1].close()


# ---- paths ----------------------------------------------------------------------------------------------------------


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere/me")
    monkeypatch.setenv("JOB", "7")
    assert resolve_path("~/$JOB/a${JOB}b") == Path("/somewhere/me/7/a7b")
    assert resolve_path("here") == Path.cwd() / "here"


@pytest.mark.parametrize("path", ["/nvme/$NO_SUCH_VARIABLE", "${NO_SUCH_VARIABLE}", "/nvme/$EMPTY/x"])
def test_a_variable_without_a_value_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(GrassConfigError, match=r"environment variable (NO_SUCH_VARIABLE|EMPTY) is not set"):
        resolve_path(path)
