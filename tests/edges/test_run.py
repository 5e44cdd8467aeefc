# SPDX-License-Identifier: Apache-2.0
"""The runner of the edges: its overlays lie at the ends of the tested ranges, its rows are the table of the docs, and what fails is told."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from edges import run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from grass_ds.versions import RANGES

ROOT = Path(__file__).resolve().parents[2]


def lower_bound(name: str) -> Version:
    return next(Version(part.version) for part in SpecifierSet(RANGES[name]) if part.operator == ">=")


def pinned(stack: tuple[str, ...]) -> dict[str, Version]:
    return {name: Version(version) for name, version in (requirement.split("==") for requirement in stack)}


def plain(version: str) -> str:
    """Without the local part, such as "+cpu"."""
    return version.split("+")[0]


@pytest.mark.parametrize("edge", ["lowest", "lowest for launch/"])
def test_a_lowest_edge_is_the_lower_end_of_every_range(edge: str) -> None:
    """A range says less than a release does: 4.51 begins with 4.51.3 here."""
    lowest = pinned(run.EDGES[edge])
    overlaid = [name for name in RANGES if name in lowest]
    assert overlaid == ["deepspeed", "transformers", "accelerate", "datasets"]
    ends = {name: lower_bound(name) for name in overlaid}
    if edge == "lowest for launch/":
        ends["transformers"] = run.LAUNCH_TRANSFORMERS
    for name, end in ends.items():
        assert lowest[name].release[:2] == end.release[:2]
        assert lowest[name] >= end


def test_the_newest_edge_is_not_older_than_what_is_installed_for_the_tests() -> None:
    newest = pinned(run.edges_for((3, 11))["newest"])
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if requirement.name in newest:
            assert all(newest[requirement.name] >= Version(part.version) for part in requirement.specifier)
    assert all(SpecifierSet(RANGES[name]).contains(newest[name]) for name in RANGES if name in newest)


def test_python_3_10_gets_the_newest_transformers_that_it_can_install() -> None:
    assert pinned(run.edges_for((3, 10))["newest"])["transformers"] < Version("5.21")
    assert pinned(run.edges_for((3, 11))["newest"])["transformers"] >= Version("5.21")


def test_every_edge_was_run_with_the_versions_that_it_names_now() -> None:
    rows = {row["edge"]: row["versions"] for row in run.read_rows()}
    assert set(run.EDGES) <= set(rows)
    for edge in run.EDGES:
        found = rows[edge]
        pins = pinned(run.edges_for(Version(found["python"]).release[:2])[edge])
        expected = {name: str(version) for name, version in pins.items() if name in run.RECORDED}
        assert {name: plain(found.get(name, "not recorded")) for name in expected} == expected


def test_the_page_has_the_rows_that_were_kept_and_the_tested_ranges() -> None:
    page = run.PAGE.read_text()
    assert run.with_table(page, run.read_rows()) == page
    stated = dict(re.findall(r"^\| (\w+(?: \(.*\))?) \| ([<>=.,\d]+) \|$", page.lower(), re.MULTILINE))
    assert stated.pop("transformers (for `launch/`)") == f">={run.LAUNCH_TRANSFORMERS},<6"
    assert {name.split()[0]: span for name, span in stated.items()} == RANGES


def test_both_ends_of_python_and_torch_were_run() -> None:
    """Those that no overlay can bring."""
    rows = [row for row in run.read_rows() if set(row["checks"].values()) <= set(run.GOOD)]
    for name in ("python", "torch"):
        found = {Version(row["versions"][name].split("+")[0]).release[:2] for row in rows}
        ends = {part.operator: Version(part.version).release for part in SpecifierSet(RANGES[name])}
        assert min(found) == ends[">="][:2]
        assert max(found)[1] == ends["<"][1] - 1


REPORT = """<testsuites><testsuite>
<testcase classname="tests.core.test_deepspeed_compat" name="test_a"/>
<testcase classname="tests.edges.cycle" name="test_full_sampler_is_stock[1]"/>
<testcase classname="tests.edges.cycle" name="test_full_sampler_is_stock[2]"><failure/></testcase>
<testcase classname="tests.edges.cycle" name="test_only_x_is_the_straight_one[2-False]"/>
<testcase classname="tests.launch.test_rows" name="test_b"><skipped/></testcase>
<testcase classname="tests.edges.trainer_cycle" name="test_c"><error/></testcase>
</testsuite></testsuites>"""


def test_a_check_is_ok_only_where_its_tests_ran_and_passed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    nothing = dict.fromkeys(run.CHECKS, "not run")
    assert run.outcomes(report, 0) == nothing
    report.write_text(REPORT)
    expected = {"contract": "ok", "ZeRO-1": "ok", "ZeRO-2": "1 failed", "Trainer": "1 failed"}
    assert run.outcomes(report, 1) == {**nothing, **expected}
    ended = dict.fromkeys(("contract", "ZeRO-1"), "pytest ended with 2")
    assert run.outcomes(report, 2) == {**nothing, **expected, **ended}
    report.write_text(REPORT[:100])
    assert run.outcomes(report, 0) == nothing


def test_every_test_file_belongs_to_a_check() -> None:
    for file in run.TESTS + run.CALLBACK_TESTS + run.LAUNCH_TESTS:
        assert (run.ROOT / file).exists()
        name = file.removesuffix(".py").replace("/", ".")
        owners = [check for check, marks in run.CHECKS.items() if any(mark in name for mark in marks)]
        assert len(owners) == 1 or name == "tests.edges.cycle"  # whose tests have a stage, and a check, of their own
        assert (owners == ["launch"]) == (file in run.LAUNCH_TESTS)


@pytest.mark.parametrize("version", ["none", "4.51.3", "5.2.0", "5.3.0"])
def test_a_row_tells_what_was_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str) -> None:
    """The tests of launch/ are named to pytest only where they can pass; elsewhere their column is "-"."""
    versions = {**dict.fromkeys(run.RECORDED, "1.0"), "python": "3.11.7", "transformers": version}
    commands: list[tuple[str, ...]] = []

    def pretend(arguments: tuple[str, ...], environment: dict[str, str]) -> int:
        commands.append(arguments)
        assert environment["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "py311-torch1.0-deepspeed1.0")
        return 0

    made = {"versions_in": lambda _: versions, "finished": pretend, "commit": lambda: "abc", "OPS": tmp_path}
    for name, value in made.items():
        monkeypatch.setattr(run, name, value)
    row = run.run("mine", [], here=True)
    assert (row["edge"], row["versions"], row["commit"]) == ("mine", versions, "abc")
    assert isinstance(row["seconds"], int)
    with_launch = version == "5.3.0"
    assert row["checks"] == {**dict.fromkeys(run.CHECKS, "not run"), "launch": "not run" if with_launch else "-"}
    assert "timeout=150" in commands[1]
    assert set(run.TESTS) <= set(commands[1])
    assert set(commands[1]).isdisjoint(run.LAUNCH_TESTS) != with_launch
    assert set(commands[1]).isdisjoint(run.CALLBACK_TESTS) == with_launch


def stub_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: dict[str, str]) -> list[str]:
    """The runner on a page and rows of its own; returns the names of the edges that it runs."""
    ran: list[str] = []

    def pretend(name: str, overlays: Any, here: bool) -> dict[str, Any]:
        ran.append(name)
        versions = dict.fromkeys(("python", *run.PACKAGES), "1.0+cpu")
        return {"edge": name, "versions": versions, "checks": checks, "date": "2026-01-01", "commit": "abc"}

    page = tmp_path / "page.md"
    page.write_text(f"before\n{run.BEGIN}\n{run.END}\nafter\n")
    for name, value in {"run": pretend, "ROWS": tmp_path / "rows.jsonl", "PAGE": page, "CACHE": tmp_path}.items():
        monkeypatch.setattr(run, name, value)
    return ran


def test_rows_of_an_edge_are_replaced_and_the_exit_code_tells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = dict.fromkeys(run.CHECKS, "ok")
    bad = {**good, "ZeRO-3": "2 failed"}
    stub_of(monkeypatch, tmp_path, good)
    assert [run.main(["--here", name, "--record"]) for name in ("mine", "other")] == [0, 0]
    ran = stub_of(monkeypatch, tmp_path, bad)
    assert run.main(["--here", "mine", "--record"]) == 1
    assert ran == ["mine"]
    assert [(row["edge"], row["checks"]) for row in run.read_rows()] == [("mine", bad), ("other", good)]
    text = run.PAGE.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")] == [
        "| run",
        "| ---",
        "| mine",
        "| other",
    ]


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("-", 0), ("not run", 1), ("pytest ended with 3", 1)])
def test_the_exit_code_tells_of_a_check_that_is_meant_and_not_ok(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str, code: int
) -> None:
    stub_of(monkeypatch, tmp_path, {**dict.fromkeys(run.CHECKS, "ok"), "launch": state})
    assert run.main(["--here", "mine"]) == code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["middle"], "no edge 'middle'; there are: lowest, newest"),
        (["--here", "mine", "lowest"], "name no edges with it"),
        (["--here", "lowest"], "'lowest' is an edge"),
    ],
)
def test_wrong_names_are_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments)
    assert words in capsys.readouterr().err


def hang(*_: str) -> str:
    raise subprocess.TimeoutExpired("pip", 1)


@pytest.mark.parametrize("pip", [hang, lambda *_: "no route to host"], ids=["no answer", "no route"])
def test_an_edge_that_cannot_be_fetched_is_skipped_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], pip: Any
) -> None:
    ran = stub_of(monkeypatch, tmp_path, dict.fromkeys(run.CHECKS, "ok"))
    monkeypatch.setattr(run, "EDGES", {"far": ("grass-far==1.0",), "near": ()})
    monkeypatch.setattr(run, "pip", pip)
    assert run.main([]) == 0
    assert ran == ["near"]
    expected = "far skipped: the package index cannot be reached, and grass-far==1.0 is not in"
    assert expected in capsys.readouterr().out


def test_what_pip_refuses_for_another_reason_fails_that_edge_and_the_others_are_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub_of(monkeypatch, tmp_path, dict.fromkeys(run.CHECKS, "ok"))
    monkeypatch.setattr(run, "EDGES", {"before": (), "refused": ("grass-far==1.0",), "after": ()})
    monkeypatch.setattr(run, "pip", lambda *a: "ERROR: no such release" if a[0] == "install" else "")
    assert run.main(["--record"]) == 1
    assert "refused failed: pip cannot install grass-far==1.0: ERROR: no such release\n" in capsys.readouterr().out
    assert [row["edge"] for row in run.read_rows()] == ["before", "after"]
    assert not list(tmp_path.rglob("grass-far*"))


def test_pip_complains_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "WARNING: slow\nERROR: no matching release\nhint: see above\n"
    for error, code, line in [(said, 1, "ERROR: no matching release"), ("", 1, "failed"), (said, 0, "")]:
        done = subprocess.CompletedProcess([], code, "", error)
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        assert run.pip("install", "x") == line


def test_an_overlay_is_installed_once_and_not_where_the_environment_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, ...]] = []

    def install(*arguments: str) -> str:
        calls.append(arguments)
        Path(arguments[arguments.index("--target") + 1], "module.py").write_text("")
        return ""

    monkeypatch.setattr(run, "CACHE", tmp_path)
    monkeypatch.setattr(run, "pip", install)
    assert run.overlay(f"pytest=={pytest.__version__}") is None
    folder = run.overlay("grass-far==1.0")
    assert folder is not None
    assert [path.name for path in folder.iterdir()] == ["module.py"]
    assert folder.stat().st_mode & 0o777 == 0o755
    assert run.overlay("grass-far==1.0") == folder
    assert len(calls) == 1
    assert [path.name for path in folder.parent.iterdir()] == ["grass-far-1.0"]


def test_an_overlay_stands_before_the_environment_and_a_package_that_is_missing_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "somewhere" / "numpy-1.0" / "numpy-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    monkeypatch.setattr(run, "RECORDED", ("numpy", "grass-far"))
    found = run.versions_in(run.surroundings([info.parent]))
    assert (found["numpy"], found["grass-far"]) == ("1.0", "none")


def test_ops_of_another_deepspeed_have_a_folder_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    versions = {"python": "3.11.7", "torch": "2.13.0+cpu", "deepspeed": "0.19.3"}
    own = run.OPS / "py311-torch2.13.0-deepspeed0.19.3"
    other, same = [Path("numpy-1.0"), Path("deepspeed-0.19.3")], [Path("numpy-1.0")]
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert run.ops_folder(versions, other, here=False) == own
    assert run.ops_folder(versions, [], here=True) == own
    assert run.ops_folder(versions, same, here=False) == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    assert run.ops_folder(versions, same, here=False) == run.ROOT / ".torch_extensions"
    assert run.CACHE not in run.OPS.parents


def test_what_a_killed_run_left_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "CACHE", tmp_path / "edges")
    monkeypatch.setattr(run, "OPS", tmp_path / "ops")
    (tmp_path / "edges" / "py311" / "tmpabc").mkdir(parents=True)
    (tmp_path / "edges" / "py311" / "numpy-1.0").mkdir()
    with run.alone():
        assert [path.name for path in (tmp_path / "edges" / "py311").iterdir()] == ["numpy-1.0"]
    locks = [tmp_path / "ops" / "py311" / "op" / "lock", tmp_path / "shared" / "op" / "lock"]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
        run.remove_stale_locks(lock.parents[1])
    assert [lock.exists() for lock in locks] == [False, True]  # somebody else may be compiling in the shared one
    old = time.time() - 3 * run.SECONDS
    os.utime(locks[1], (old, old))
    run.remove_stale_locks(locks[1].parents[1])
    assert not locks[1].exists()


def test_a_second_run_waits_for_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "import sys, pathlib; from edges import run; run.CACHE = pathlib.Path(sys.argv[1])\nwith run.alone(): print('in', flush=True)"
    monkeypatch.setattr(run, "CACHE", tmp_path)
    with run.alone():
        command = [sys.executable, "-c", code, str(tmp_path)]
        second = subprocess.Popen(command, env=run.surroundings([]), stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert second.stdout.readline().startswith("waiting for another run")
        assert second.poll() is None
    assert second.communicate(timeout=30)[0] == "in\n"


def test_what_takes_too_long_is_killed_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.finished(("-c", "raise SystemExit(3)"), dict(os.environ)) == 3
    monkeypatch.setattr(run, "SECONDS", 2)
    pids = tmp_path / "pids"
    code = f"""
import os, time
child = os.fork()
if child:
    open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child}}")
time.sleep(60)
"""
    began = time.monotonic()
    assert run.finished(("-c", code), dict(os.environ)) is None
    assert time.monotonic() - began < 30
    assert "not done after 2 s: python -c" in capsys.readouterr().out
    assert all(map(is_gone, map(int, pids.read_text().split())))


def is_gone(pid: int) -> bool:
    """Whether a process was killed. Nobody may have collected it yet."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return False


def test_without_git_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.commit() == "unknown"


def test_the_workflow_of_the_night_repeats_environments_that_were_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "edges.yml").read_text())
    jobs = {job["name"]: job for job in workflow["jobs"]["here"]["strategy"]["matrix"]["include"]}
    rows = {row["edge"]: row["versions"] for row in run.read_rows() if row["edge"] not in run.EDGES}
    assert set(jobs) - set(rows) == {"newest of all"}
    for name in set(jobs) & set(rows):
        assert rows[name]["python"].startswith(jobs[name]["python"] + ".")
        pins = dict(requirement.split("==") for requirement in jobs[name]["packages"].split())
        assert {package: plain(rows[name][package]) for package in pins} == pins


def test_the_workflow_of_a_change_keeps_the_overlays() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    paths = [step["with"]["path"] for step in workflow["jobs"]["all"]["steps"] if "cache" in step.get("uses", "")]
    assert [ROOT / path for path in paths] == [run.CACHE]
