# SPDX-License-Identifier: Apache-2.0
"""`python -m grass_ds doctor`: its findings on machines that are broken in one way each, and in real processes."""

import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.disks import mounted
from helpers.ranks import RankPool, free_port
from torch.utils import cpp_extension

from grass_ds.__main__ import main
from grass_ds.cluster.placement import Placement
from grass_ds.doctor import checks, disks, extensions, fitting, machine, run
from grass_ds.doctor.finding import FAIL, OK, WARN, Finding, Report, examine
from grass_ds.versions import RANGES

ROOT = Path(__file__).resolve().parents[2]


def statuses(findings: Iterable[Finding]) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


# ---- single checks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "status"), [("2.13.0+cpu", OK), ("2.5.1", WARN), ("2.16.0", WARN)])
def test_versions_are_compared_with_the_tested_ranges(found: str, status: str) -> None:
    with mock.patch.object(run, "installed", {"torch": found}.get):
        (finding,) = run.check_versions()
    assert (finding.check, finding.status) == ("torch", status)
    assert finding.remedy == ("" if status == OK else f"pip install 'torch{RANGES['torch']}'")


def test_a_check_that_raises_hides_nothing() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("disk", OK, "there")
        raise OSError("on fire")

    assert examine("disk", check) == [Finding("disk", OK, "there"), Finding("disk", FAIL, "OSError: on fire")]


def test_locks_count_when_nobody_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("fresh", 30), ("held", 3600), ("stale", 3600)):
        (tmp_path / name).mkdir()
        for file in ("lock", "old.o"):
            (tmp_path / name / file).touch()
            os.utime(tmp_path / name / file, (0, time.time() - age))
    os.utime(tmp_path / "fresh" / "lock", (0, time.time() - 3600))
    with (tmp_path / "held" / "lock").open():
        fresh, held, stale = extensions.check_locks()
    assert (fresh.status, held.status, stale.status) == (WARN, OK, FAIL)
    assert stale.remedy.endswith(f"rm {tmp_path / 'stale' / 'lock'}")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    assert statuses(extensions.check_locks()) == {"build lock": OK}


def test_extensions_are_looked_for_where_torch_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder in (str(tmp_path / "mine"), None):
        if folder is None:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        else:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", folder)
        assert str(extensions.extensions_root() / "op") == cpp_extension._get_build_directory("op", verbose=False)


def test_ranks_join_only_where_nothing_is_left_to_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = extensions.SHARED_MEMORY
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert "not compiled" in next(extensions.check_extensions()).finding
    assert not extensions.communication_ready()
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.so").touch()
    assert next(extensions.check_extensions()) == Finding(name, OK, f"compiled in {tmp_path / name}")
    assert extensions.communication_ready()
    lock = tmp_path / name / "lock"
    lock.touch()
    threading.Timer(0.2, lock.unlink).start()  # another rank loads it
    assert extensions.communication_ready()
    lock.touch()
    monkeypatch.setattr(extensions, "LOADING_SECONDS", 0.1)
    assert not extensions.communication_ready()


def test_limits_of_memory(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    assert machine.cgroup_limit(membership, tmp_path) is None
    membership.write_text("0::/slurm/job_1/task\n")
    (tmp_path / "slurm/job_1/task").mkdir(parents=True)
    (tmp_path / "slurm/memory.max").write_text("8000\n")
    (tmp_path / "slurm/job_1/memory.max").write_text("5000\n")
    (tmp_path / "slurm/job_1/task/memory.max").write_text("max\n")
    assert machine.cgroup_limit(membership, tmp_path) == 5000
    assert [machine.judge_memlock(limit).status for limit in (-1, 65536, 2**33)] == [OK, WARN, OK]


def test_a_local_disk_is_measured_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "TEST_BYTES", 2**20)
    (found,) = disks.check_nvme(str(tmp_path))
    assert "GB free" in found.finding and "MB/s" in found.finding
    with mounted(tmp_path / "memory", 8 * 2**20) as path:
        (found,) = disks.check_nvme(str(path))
        assert (found.status, "takes host memory" in found.finding) == (WARN, True)
        assert os.listdir(path) == []
        monkeypatch.setattr(disks, "TEST_BYTES", 2**24)  # more than there is: what training would say
        assert "are free" in examine("nvme_path", disks.check_nvme, str(path))[-1].finding
    with mounted(tmp_path / "readonly", 2**20, "ro") as path:
        assert statuses(examine("nvme_path", disks.check_nvme, str(path))) == {"nvme_path": FAIL}
    (found,) = examine("nvme_path", disks.check_nvme, str(tmp_path / "missing"))
    assert (found.status, "No such file" in found.finding) == (FAIL, True)
    assert sorted(os.listdir(tmp_path)) == ["memory", "readonly"]


# ---- several ranks -------------------------------------------------------------------------------------------------


def test_findings_of_other_ranks_are_kept() -> None:
    mine, other, theirs = Finding("a", WARN, "x"), Finding("b", FAIL, "y"), Finding("numpy", OK, "2.1")
    assert checks.merge([[mine], [mine, other, Finding("c", OK, "z")], [other]]) == [
        mine,
        Finding("b", FAIL, "rank 1: y"),
    ]
    (_, found) = checks.merge([[Finding("numpy", OK, "2.4")], [theirs], [theirs]])
    assert (found.status, found.finding) == (FAIL, "rank 1: 2.1, not as on rank 0")


def check_shared_folder(path: str) -> list[Finding]:
    """Rank 1 does not see what rank 0 writes."""
    visible = disks.dist.get_rank() != 1
    with mock.patch.object(disks, "becomes_visible", return_value=visible):
        return examine("shared_path", disks.check_shared, path)


@pytest.mark.dist
def test_a_folder_that_ranks_do_not_share_is_named(two_ranks: RankPool, tmp_path: Path) -> None:
    for (found,) in two_ranks.run(check_shared_folder, path=str(tmp_path)):
        assert found.finding == f"{tmp_path}: rank 1 does not see what rank 0 writes"
    assert os.listdir(tmp_path) == []
    for (found,) in two_ranks.run(check_shared_folder, path=str(tmp_path / "missing")):
        assert (found.status, "No such file" in found.finding) == (FAIL, True)


def test_a_file_becomes_visible_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "SHARED_SECONDS", 0.0)
    (tmp_path / "marker").touch()
    assert [disks.becomes_visible(tmp_path / name) for name in ("marker", "other", "none/marker")] == [
        True,
        False,
        False,
    ]


# ---- the program ---------------------------------------------------------------------------------------------------


def test_the_report_is_text_or_json_and_sets_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    slow, failed = Finding("disk", WARN, "slow " * 40, "buy another disk"), Finding("b", FAIL, "y")
    text = io.StringIO()
    assert Report(text, findings=[slow], ranks=[{"rank": 0, "host": "n1"}]).write() == 0
    assert "slow " * 40 in text.getvalue()  # not wrapped
    assert text.getvalue().count("remedy: buy another disk") == 1
    assert text.getvalue().endswith("\nrank: 0  host: n1\ntraining can start\n")
    text = io.StringIO()
    assert Report(text, as_json=True, findings=[slow, failed]).write() == 1
    expected = {"status": FAIL, "findings": [asdict(slow), asdict(failed)], "ranks": []}
    assert json.loads(text.getvalue()) == expected
    text = io.StringIO()
    assert Report(text, findings=[slow, failed], rank=1).write() == 1  # and rank 0 does not know
    assert (text.getvalue(), capsys.readouterr().err) == ("", "rank 1: b: y\n")


def test_contradictions_of_launchers_are_reported(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor"]) == 1
    out = capfd.readouterr().out
    assert "RANK=3 must be below WORLD_SIZE=2" in out
    assert "ok    precision" in out  # checks that need no launcher go on
    assert out.endswith("not ready to train\n")


def test_without_a_command_the_help_is_printed(capfd: Any) -> None:
    assert main([]) == 0
    assert main(["--local_rank=1"]) == 0  # as the DeepSpeed launcher starts it
    assert "doctor" in capfd.readouterr().out


def doctor(*arguments: str, start: tuple[str, ...] = ("-m", "grass_ds"), **environment: str) -> Any:
    """Run it in a process of its own, which joins a process group."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, *start, "doctor", *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_where_torch_does_not_load_the_report_says_so(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    done = doctor("--json", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1, done.stderr
    findings = {finding["check"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert (findings["import"]["status"], findings["torch"]["status"]) == (FAIL, OK)
    assert "libcudart.so.13" in findings["import"]["finding"]


@pytest.mark.dist
def test_one_process_by_itself(tmp_path: Path) -> None:
    done = doctor("--json", "--shared_path", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] in (OK, WARN)
    found = {finding["check"] for finding in report["findings"]}
    assert {"accelerator", "build lock", "host memory", "launcher", "memlock", "precision", "shared_path"} <= found
    assert os.listdir(tmp_path) == []


@pytest.mark.dist
def test_two_ranks_report_once() -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    done = doctor("--json", start=(*torchrun, "-m", "grass_ds"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    places = [(row["rank"], row["local_rank"], row["device"]) for row in report["ranks"]]
    assert places == [(0, 0, "cpu"), (1, 1, "cpu")]
    sizes = [f["finding"].split(" ")[0] for f in report["findings"] if f["check"] == "all-reduce"]
    assert sizes == [str(nbytes) for nbytes in checks.SIZES]


IMPATIENT = """
import sys
from grass_ds.__main__ import main
from grass_ds.doctor import checks
setattr(checks, sys.argv.pop(), 3.0)
sys.exit(main())
"""


@pytest.mark.dist
@pytest.mark.parametrize(
    ("time_out", "text"), [("JOIN_SECONDS", "1/2 clients joined"), ("LIMIT_SECONDS", "no end after 3 s")]
)
def test_a_missing_rank_fails_the_check(time_out: str, text: str) -> None:
    placement = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = doctor(time_out, start=("-c", IMPATIENT), **placement, **master)
    assert done.returncode == 1, done.stderr
    assert "FAIL  process group       rank 0 of 2" in done.stdout
    assert text in done.stdout
    assert "nothing heard of rank 1\n" in done.stdout


NCCL_ERROR = """NCCL error in: ProcessGroupNCCL.cpp:77, invalid usage, NCCL version 2.27.3
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000
Exception raised from getNCCLComm at ProcessGroupNCCL.cpp:77 (most recent call first):
frame #0: c10::Error"""


def test_two_ranks_on_one_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The communication library finds out, and says so in the last line of its message."""
    monkeypatch.setattr(checks.dist, "init_distributed", mock.Mock(side_effect=RuntimeError(NCCL_ERROR)))
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # which it would set
    report = Report(io.StringIO())
    checks._check_together(report, Placement(0, 0, 1, 1, "127.0.0.1", free_port(), "none"), None)
    (found,) = report.findings
    assert found.status == FAIL
    assert found.finding.endswith("Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1a000")


# ---- plans ------------------------------------------------------------------------------------------------------------

GB = 10**9
NEEDS = {"ranks": 2, "device_bytes": 10 * GB, "host_bytes": 30 * GB, "disk_bytes": 0, "nvme_path": "/"}


class Devices:
    """An accelerator with memory of its own."""

    def __init__(self, count: int, memory: int) -> None:
        self.device_count, self.total_memory, self.device_name = lambda: count, lambda: memory, lambda: "cuda"


@pytest.mark.parametrize(
    ("needs", "count", "memory", "host", "expected"),
    [
        ({}, 2, 24 * GB, 64 * GB, [OK, OK]),
        ({}, 2, 10 * GB - 1, 64 * GB, [FAIL, OK]),
        ({}, 2, 24 * GB, 30 * GB - 1, [OK, FAIL]),
        ({}, 1, 24 * GB, 64 * GB, [OK, WARN, OK]),
        ({"disk_bytes": 10**6}, 2, 24 * GB, 64 * GB, [OK, OK, OK]),
        ({"disk_bytes": 10**18}, 2, 24 * GB, 64 * GB, [OK, OK, FAIL]),
    ],
)
def test_a_plan_is_compared_with_the_machine(
    needs: dict[str, Any], count: int, memory: int, host: int, expected: list[str]
) -> None:
    with (
        mock.patch.object(fitting, "get_accelerator", return_value=Devices(count, memory)),
        mock.patch.object(fitting, "available_memory", return_value=host),
    ):
        found = list(fitting.check_plan({**NEEDS, **needs}))
    assert [finding.status for finding in found] == expected
    assert all(bool(finding.remedy) == (finding.status != OK) for finding in found)


def test_on_the_cpu_devices_and_host_are_one_memory() -> None:
    for memory, status in ((50 * GB, OK), (50 * GB - 1, FAIL)):
        with mock.patch.object(fitting, "available_memory", return_value=memory):
            (found,) = fitting.check_plan(NEEDS)
        assert found.status == status


def test_the_limit_of_the_job_counts() -> None:
    for limit, most in ((None, 2**60), (5 * GB, 5 * GB)):
        with mock.patch.object(fitting, "cgroup_limit", return_value=limit):
            assert 0 < fitting.available_memory() <= most


@pytest.mark.parametrize(("size", "code"), [(16, 0), (10**9, 1)])
def test_doctor_plans_or_reads_a_plan(tmp_path: Path, size: int, code: int) -> None:
    """In a process of its own: the exit code is the answer. One that needs more than any machine has does not fit."""
    file, needs = (
        tmp_path / "plan.json",
        {**NEEDS, "ranks": 1, "device_bytes": size * 10**6, "host_bytes": size * 10**6, "disk_bytes": 1},
    )
    file.write_text(json.dumps({"needs": needs}))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "grass_ds", "doctor", "--json", "--plan", str(file), "--nvme_path", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300, check=False)
    of_plan = [finding for finding in json.loads(done.stdout)["findings"] if finding["check"] == "plan"]
    statuses_of_plan = {finding["status"] for finding in of_plan}
    assert any(finding["finding"].startswith(f"disk at {tmp_path}") for finding in of_plan)
    assert statuses_of_plan == ({OK} if code == 0 else {FAIL, OK})  # the disk is large enough in both
    assert done.returncode >= code


@pytest.mark.parametrize(
    ("content", "said"), [("{", "not a plan"), ("{}", "not a plan (KeyError"), (None, "No such file")]
)
def test_a_plan_that_is_none_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_text(content)
    assert main(["doctor", "--plan", str(file)]) == 1
    assert said in capsys.readouterr().err
    assert main(["doctor", "--plan"]) == 1
    assert "a plan needs --model and --gpus" in capsys.readouterr().err
