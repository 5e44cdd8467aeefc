# SPDX-License-Identifier: Apache-2.0
"""The runner of the edges: its layers lie at the ends of the tested ranges, its rows are the table of the docs, and what fails is told."""

import re
from pathlib import Path
from typing import Any

import pytest
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


def test_the_lowest_edge_is_the_lower_end_of_every_range() -> None:
    """A range says less than a release does: 4.51 begins with 4.51.3 here."""
    lowest = pinned(run.EDGES["lowest"])
    layered = [name for name in RANGES if name in lowest]
    assert layered == ["deepspeed", "transformers", "accelerate", "datasets"]
    for name in layered:
        assert lowest[name].release[:2] == lower_bound(name).release[:2]
        assert lowest[name] >= lower_bound(name)


def test_the_newest_edge_is_not_older_than_what_is_installed_for_the_tests() -> None:
    newest = pinned(run.EDGES["newest"])
    lines = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    for requirement in (Requirement(line) for line in lines if line and not line.startswith("#")):
        if requirement.name in newest:
            assert all(newest[requirement.name] >= Version(part.version) for part in requirement.specifier)
    assert all(SpecifierSet(RANGES[name]).contains(newest[name]) for name in RANGES if name in newest)


def test_the_page_has_the_rows_that_were_kept_and_the_tested_ranges() -> None:
    page = run.PAGE.read_text()
    assert run.with_table(page, run.read_rows()) == page
    stated = dict(re.findall(r"^\| (\w+)(?: \(.*\))? \| ([<>=.,\d]+) \|$", page.lower(), re.MULTILINE))
    assert stated == RANGES


def test_both_ends_of_python_and_torch_were_run() -> None:
    """Those that no layer can bring."""
    rows = [row for row in run.read_rows() if set(row["checks"].values()) == {"ok"}]
    for name in ("python", "torch"):
        found = {Version(row["versions"][name].split("+")[0]).release[:2] for row in rows}
        ends = {part.operator: Version(part.version).release for part in SpecifierSet(RANGES[name])}
        assert min(found) == ends[">="][:2]
        assert max(found)[1] == ends["<"][1] - 1


REPORT = """<testsuites><testsuite>
<testcase classname="tests.runtime.test_seams" name="test_a"/>
<testcase classname="tests.edges.test_cycle" name="test_full_sampler_is_stock[1]"/>
<testcase classname="tests.edges.test_cycle" name="test_full_sampler_is_stock[2]"><failure/></testcase>
<testcase classname="tests.edges.test_cycle" name="test_only_x_is_the_straight_one[2-plain]"/>
<testcase classname="tests.launch.test_rows" name="test_b"><skipped/></testcase>
<testcase classname="tests.edges.test_trainer_cycle" name="test_c"><error/></testcase>
</testsuite></testsuites>"""


def test_a_check_is_ok_only_where_its_tests_ran_and_passed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    nothing = dict.fromkeys(run.CHECKS, "not run")
    assert run.outcomes(report) == nothing
    report.write_text(REPORT)
    expected = {"contract": "ok", "ZeRO-1": "ok", "ZeRO-2": "1 failed", "Trainer": "1 failed"}
    assert run.outcomes(report) == {**nothing, **expected}


def stub_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checks: dict[str, str]) -> list[str]:
    """The runner on a page and rows of its own; returns the names of the edges that it runs."""
    ran: list[str] = []

    def pretend(name: str, layers: Any) -> dict[str, Any]:
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


def test_an_unknown_edge_is_an_error_that_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["middle"])
    assert "no edge 'middle'; there are: lowest, newest" in capsys.readouterr().err


def test_without_the_index_nothing_is_run_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = stub_of(monkeypatch, tmp_path, {})
    monkeypatch.setattr(run, "pip", lambda *_: "no route to host")
    assert run.main(["lowest"]) == 0
    assert ran == []
    assert "edges skipped: the package index cannot be reached, and deepspeed==0.19.3" in capsys.readouterr().out


def test_what_pip_refuses_for_another_reason_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stub_of(monkeypatch, tmp_path, {})
    monkeypatch.setattr(run, "pip", lambda *a: "no such release" if a[0] == "install" else "")
    with pytest.raises(RuntimeError, match=r"pip cannot install deepspeed==0.19.3:\nno such release"):
        run.layer("deepspeed==0.19.3")
    assert not list(tmp_path.rglob("deepspeed*"))


def test_a_layer_stands_before_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "CACHE", tmp_path)
    made = tmp_path / "somewhere" / "numpy-1.0"
    made.mkdir(parents=True)
    (made / "numpy-1.0.dist-info").mkdir()
    (made / "numpy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    environment = run.surroundings("x", [made])
    assert run.versions_in(environment)["numpy"] == "1.0"
    assert "TORCH_EXTENSIONS_DIR" not in environment or "numpy" not in environment["TORCH_EXTENSIONS_DIR"]
    other = run.surroundings("x", [tmp_path / "deepspeed-0.19.3"])
    assert other["TORCH_EXTENSIONS_DIR"] == str(tmp_path / "deepspeed-0.19.3-ops")


def test_the_workflow_of_the_night_names_environments_that_were_run() -> None:
    text = (ROOT / ".github" / "workflows" / "edges.yml").read_text()
    names = set(re.findall(r'- name: "(.+)"', text))
    assert names - {row["edge"] for row in run.read_rows()} <= {"newest of all"}
