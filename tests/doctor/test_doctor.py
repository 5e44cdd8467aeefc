# SPDX-License-Identifier: Apache-2.0
"""`python -m grass_ds doctor`: what it finds on machines that are broken in one way each, and what two real ranks find together."""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers.disks import mounted
from helpers.ranks import free_port
from torch.utils import cpp_extension

from grass_ds.__main__ import main
from grass_ds.cluster.placement import Placement
from grass_ds.doctor import disks, extensions, machine, ranks, rendezvous, software
from grass_ds.doctor.finding import FAIL, OK, WARN, WIDTH, Finding, examine
from grass_ds.doctor.run import Report
from grass_ds.versions import RANGES

ROOT = Path(__file__).resolve().parents[2]


def statuses(findings: Any) -> dict[str, str]:
    return {finding.check: finding.status for finding in findings}


# ---- one process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("found", "status"), [("2.13.0+cpu", OK), ("2.5.1", WARN), ("2.16.0", WARN), (None, FAIL)])
def test_versions_are_held_to_the_tested_ranges(found: str | None, status: str) -> None:
    finding = software.judge_version("torch", found)
    assert finding.status == status
    assert finding.remedy == ("" if status == OK else f"pip install 'torch{RANGES['torch']}'")


def test_what_is_needed_and_what_is_optional() -> None:
    findings = {finding.check: finding for finding in software.check_versions()}
    assert findings.keys() == {*RANGES, *software.EXTRAS.values()}
    with mock.patch.object(software, "installed", return_value=None):
        missing = {finding.check: finding for finding in software.check_versions()}
    assert {name for name, finding in missing.items() if finding.status == FAIL} == RANGES.keys() - {"datasets"}
    assert missing["datasets"].finding == "not installed (optional: pip install 'grass_ds[launch]')"


def test_a_check_that_breaks_down_hides_nothing() -> None:
    def check() -> Iterator[Finding]:
        yield Finding("disk", OK, "there")
        raise OSError("on fire")

    assert examine("disk", check) == [Finding("disk", OK, "there"), Finding("disk", FAIL, "OSError: on fire")]


def test_locks_count_when_nobody_compiles(tmp_path: Path) -> None:
    for name in ("held", "fresh", "stale"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    for path in (tmp_path / "held", tmp_path / "stale"):
        os.utime(path / "lock", (0, time.time() - 3600))
    (tmp_path / "stale" / "old.o").touch()
    os.utime(tmp_path / "stale" / "old.o", (0, time.time() - 600))
    with (tmp_path / "held" / "lock").open():
        found = list(extensions.check_locks(tmp_path))
    assert [f.status for f in found] == [WARN, OK, FAIL]  # fresh, held, stale
    assert str(os.getpid()) in found[1].finding
    assert "10 minutes" in found[2].finding
    assert found[2].remedy.endswith(f"rm {tmp_path / 'stale' / 'lock'}")
    assert statuses(extensions.check_locks(tmp_path / "none")) == {"build lock": OK}


def test_extensions_are_looked_for_where_torch_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for folder in (str(tmp_path / "mine"), None):
        if folder is None:
            monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        else:
            monkeypatch.setenv("TORCH_EXTENSIONS_DIR", folder)
        assert str(extensions.extensions_root() / "op") == cpp_extension._get_build_directory("op", verbose=False)


def test_without_a_compiler_the_cpu_cannot_train_unless_all_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    name = extensions.SHARED_MEMORY
    assert statuses(extensions.check_extensions()) == {"compiler": FAIL, "ninja": FAIL, name: FAIL, "async_io": WARN}
    assert not extensions.communication_ready()
    (tmp_path / name).mkdir()
    (tmp_path / name / f"{name}.so").touch()
    assert statuses(extensions.check_extensions()) == {"compiler": WARN, "ninja": FAIL, name: OK, "async_io": WARN}
    (tmp_path / "ninja").write_text("#!/bin/sh\n")
    (tmp_path / "ninja").chmod(0o755)
    assert statuses(extensions.check_extensions())["compiler"] == WARN
    assert "ninja" not in statuses(extensions.check_extensions())
    assert extensions.communication_ready()
    (tmp_path / name / "lock").touch()
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
    membership.write_text("3:cpu:/slurm\n4:memory:/old\n")
    (tmp_path / "memory/old").mkdir(parents=True)
    (tmp_path / "memory/memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert machine.cgroup_limit(membership, tmp_path) is None
    (tmp_path / "memory/old/memory.limit_in_bytes").write_text("7000\n")
    assert machine.cgroup_limit(membership, tmp_path) == 7000
    assert [machine.judge_memlock(*a).status for a in ((-1, False), (65536, False), (65536, True))] == [OK, WARN, OK]
    assert [machine.judge_shm(nbytes).status for nbytes in (64 * 2**20, 2**33)] == [WARN, OK]


def test_a_local_disk_is_measured_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "TEST_BYTES", 2**20)
    (found,) = disks.check_nvme(str(tmp_path))
    assert "GB free" in found.finding and "MB/s" in found.finding
    with mounted(tmp_path / "memory", 8 * 2**20) as path:
        assert next(iter(disks.check_nvme(str(path)))).status == WARN
        assert os.listdir(path) == []
        # what training would say of the space
        monkeypatch.setattr(disks, "TEST_BYTES", 2**24)
        assert "are free" in examine("nvme_path", disks.check_nvme, str(path))[-1].finding
    with mounted(tmp_path / "readonly", 2**20, "ro") as path:
        assert statuses(examine("nvme_path", disks.check_nvme, str(path))) == {"nvme_path": FAIL}
    assert statuses(disks.check_nvme(str(tmp_path / "missing"))) == {"nvme_path": FAIL}
    assert sorted(os.listdir(tmp_path)) == ["memory", "readonly"]


def test_a_shared_folder_shows_what_rank_0_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "SHARED_SECONDS", 0.0)
    mark = disks.leave_mark(str(tmp_path))
    assert statuses(disks.check_mark(mark)) == {"shared_path": OK}
    disks.remove_mark(mark)
    assert statuses(disks.check_mark(mark)) == {"shared_path": FAIL}
    assert os.listdir(tmp_path) == []
    (found,) = disks.check_mark(disks.leave_mark(str(tmp_path / "missing")))
    assert (found.status, "No such file" in found.finding) == (FAIL, True)


def test_the_report_is_ascii_or_json_and_sets_the_exit_code() -> None:
    long = Finding("disk", WARN, "slow " * 40, "buy a new \u00fcber disk")
    text = io.StringIO()
    assert Report(text, as_json=False).write([Finding("a", OK, "x"), long], [{"rank": 0, "host": "n1"}]) == 0
    assert text.getvalue().isascii()
    assert text.getvalue().count("remedy: ") == 1
    assert max(map(len, text.getvalue().splitlines())) <= WIDTH
    assert text.getvalue().endswith("rank  host\n0     n1\n\n1 ok, 1 warn, 0 FAIL: training can start\n")
    text = io.StringIO()
    assert Report(text, as_json=True).write([long, Finding("b", FAIL, "y")]) == 1
    assert json.loads(text.getvalue()) == {
        "status": FAIL,
        "findings": [asdict(long), {"check": "b", "status": FAIL, "finding": "y", "remedy": ""}],
        "ranks": [],
    }


def test_one_process_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor", "--json", "--shared_path", str(tmp_path)]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["status"] in (OK, WARN)
    assert {"accelerator", "backend", "build lock", "launcher", "page-locking"} <= {
        f["check"] for f in report["findings"]
    }
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["doctor", "--shared_path", str(tmp_path / "missing")]) == 1
    out = capfd.readouterr().out
    assert "RANK=3 must be below WORLD_SIZE=2" in out
    assert out.endswith("2 FAIL: not ready to train\n")
    assert main([]) == 0
    assert main(["--local_rank=1"]) == 0  # as the DeepSpeed launcher starts it
    assert "doctor" in capfd.readouterr().out


# ---- several ranks -------------------------------------------------------------------------------------------------


def fact(rank: int, host: str = "n1", **other: Any) -> dict[str, Any]:
    known = {
        "rank": rank,
        "host": host,
        "device": "0: GPU",
        "uuid": f"u{rank}",
        "address": "10.0.0.1",
        "interface": None,
    }
    return known | {"versions": {"torch": "2.13.0"}} | other


@pytest.mark.parametrize(
    ("second", "status", "text"),
    [
        ({}, OK, "2 on 1 machine"),
        ({"host": "n2", "uuid": "u0"}, OK, "2 on 2 machines"),
        ({"uuid": "u0"}, FAIL, "ranks 0, 1 share one GPU of n1"),
        ({"uuid": None}, OK, "2 on 1 machine"),
        ({"versions": {"torch": "2.12.0"}}, FAIL, "torch differs: 2.13.0 on rank 0, 2.12.0 on rank 1"),
        ({"host": "n2", "address": "127.0.1.1"}, WARN, "n2: the own name means 127.x"),
        ({"host": "n2", "address": "127.0.1.1", "interface": "eth0"}, OK, "2 on 2 machines"),
    ],
)
def test_ranks_are_compared(second: dict[str, Any], status: str, text: str) -> None:
    first = next(iter(ranks.compare({0: fact(0), 1: fact(1, **second)}, 2)))
    assert first.status == status
    assert first.finding.startswith(text)


def test_missing_ranks_are_named_and_findings_of_others_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    place = Placement(0, 0, 3, 3, "127.0.0.1", free_port(), "environment")
    meeting = rendezvous.Meeting(place, seconds=0.5)
    assert meeting.gather("facts", fact(0)) == {0: fact(0)}
    first = next(iter(ranks.compare({0: fact(0)}, 3)))
    assert (first.status, first.finding) == (FAIL, "no answer from ranks 1, 2 of 3")
    assert ranks.obstacle([first], [True]) and ranks.obstacle([], [True, False]) and not ranks.obstacle([], [True])

    mine, same, other = Finding("a", WARN, "x"), Finding("a", WARN, "x"), Finding("b", FAIL, "y")
    heard = {0: [mine], 1: [same, other, Finding("c", OK, "z")], 2: [other]}
    merged = ranks.merge({rank: [asdict(f) for f in found] for rank, found in heard.items()})
    assert merged == [mine, Finding("b", FAIL, "ranks 1, 2: y")]


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_two_ranks_report_once(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "-m", "grass_ds", "doctor", "--json", "--shared_path", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NETRC": str(tmp_path / "netrc")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(row["rank"], row["local_rank"], row["device"]) for row in report["ranks"]] == [
        (0, 0, "cpu"),
        (1, 1, "cpu"),
    ]
    said = [f"{f['check']}: {f['finding']}" for f in report["findings"]]
    assert "ranks: 2 on 1 machine" in said
    sizes = [text.split(":")[1].strip() for text in said if text.startswith("all-reduce")]
    assert sizes == ["8 bytes", "1 MiB", "16 MiB"]
    assert os.listdir(tmp_path) == []
