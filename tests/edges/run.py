# SPDX-License-Identifier: Apache-2.0
"""Run the contract tests and a short cycle of training with other versions of the packages that grass_ds stands on.

    python tests/edges/run.py              every edge of EDGES: layers of other versions over this environment
    python tests/edges/run.py lowest       one of them
    python tests/edges/run.py --here NAME  this environment as it is: another Python, another torch
    --record                               keep the rows, and write docs/compatibility.md anew

A layer is a folder made by ``pip install --no-deps --target``, once, in ``.cache/edges``; it stands before the environment's own
packages in ``PYTHONPATH``. Where a layer is missing and the package index cannot be reached, nothing is run and the exit code is 0.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "edges"
ROWS = Path(__file__).with_name("rows.jsonl")
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: python tests/edges/run.py --record -->", "<!-- end of table -->"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")
SECONDS = 600  # at most for the compilation of DeepSpeed's op, and for the tests of an edge
BUILD = """
import contextlib, sys
from deepspeed.accelerator import get_accelerator
with contextlib.redirect_stdout(sys.stderr):
    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
"""

# What the oldest and the newest Transformers need beside them.
LOWEST_TRANSFORMERS = ("transformers==4.51.3", "huggingface_hub==0.36.0", "tokenizers==0.21.4")
NEWEST_TRANSFORMERS = ("transformers==5.24.0", "huggingface_hub==2.4.0", "tokenizers==0.23.3")
LOWEST_REST = ("accelerate==1.10.0", "datasets==4.0.0", "fsspec==2025.3.0", "dill==0.3.8", "multiprocess==0.70.16")
NEWEST_REST = ("accelerate==1.15.0", "datasets==5.2.0")
EDGES: dict[str, tuple[str, ...]] = {
    "lowest": ("deepspeed==0.19.3", *LOWEST_TRANSFORMERS, *LOWEST_REST),
    "newest": ("deepspeed==0.19.8", *NEWEST_TRANSFORMERS, *NEWEST_REST),
    "lowest deepspeed, newest rest": ("deepspeed==0.19.3", *NEWEST_TRANSFORMERS, *NEWEST_REST),
}

# Column of the table -> what a test's id contains.
CHECKS: dict[str, tuple[str, ...]] = {
    "contract": ("test_seams", "test_architecture"),
    "ZeRO-1": ("is_stock[1]", "straight_one[1-"),
    "ZeRO-2": ("is_stock[2]", "straight_one[2-"),
    "ZeRO-3": ("is_stock[3]", "straight_one[3-"),
    "Trainer": ("test_trainer_cycle",),
    "data": ("tests.launch",),
}
TESTS = (
    "tests/edges/test_cycle.py",
    "tests/edges/test_trainer_cycle.py",
    "tests/runtime/test_seams.py",
    "tests/runtime/test_seams_zero3.py",
    "tests/test_architecture.py",
    "tests/launch/test_tokens.py",
    "tests/launch/test_rows.py",
)


class Unreachable(RuntimeError):
    """The package index cannot be reached."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what ``arguments`` ask for; returns the exit code: 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edges", nargs="*", metavar="edge", help=f"of: {', '.join(EDGES)}; all if none is named")
    parser.add_argument("--here", metavar="NAME", help="run this environment as it is, under this name")
    parser.add_argument("--record", action="store_true", help="keep the rows and write docs/compatibility.md anew")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.edges if name not in EDGES]:
        parser.error(f"no edge {unknown[0]!r}; there are: {', '.join(EDGES)}")
    wanted = {options.here: ()} if options.here else {name: EDGES[name] for name in options.edges or EDGES}
    try:
        layers = {name: [layer(requirement) for requirement in stack] for name, stack in wanted.items()}
    except Unreachable as reason:
        print(f"edges skipped: {reason}")
        return 0
    rows = [run(name, folders) for name, folders in layers.items()]
    if options.record:
        record(rows)
    return int(any(state != "ok" for row in rows for state in row["checks"].values()))


def layer(requirement: str) -> Path | None:
    """The folder with one package of exactly this version; None where the environment has it.

    Raises:
        Unreachable: it has to be fetched, and cannot.
        RuntimeError: pip's own words for any other failure.
    """
    name, version = requirement.split("==")
    try:
        if importlib.metadata.version(name).split("+")[0] == version:
            return None
    except importlib.metadata.PackageNotFoundError:
        pass
    folder = CACHE / f"py{sys.version_info.major}{sys.version_info.minor}" / f"{name}-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {requirement}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        if failure := pip(
            "install", "--no-deps", "--no-build-isolation", "--no-compile", "--target", part, requirement
        ):
            if pip("download", "--no-deps", "--dest", part, "pip"):
                raise Unreachable(f"the package index cannot be reached, and {requirement} is not in {CACHE}")
            raise RuntimeError(f"pip cannot install {requirement}:\n{failure}")
        Path(part).rename(folder)
        Path(part).mkdir()  # for the context to remove
    return folder


def pip(*arguments: str) -> str:
    """Run pip; its complaint, empty if it has none."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--retries", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    return done.stderr or "failed" if done.returncode else ""


def run(name: str, layers: Sequence[Path | None]) -> dict[str, Any]:
    """One row: the versions that were in force, and per check ``ok`` or how many of its tests failed."""
    began = time.monotonic()
    environment = surroundings(name, [folder for folder in layers if folder is not None])
    versions = versions_in(environment)
    print(f"== {name}: " + ", ".join(f"{package} {version}" for package, version in versions.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = ("-m", "pytest", "-p", "tiers", "-q", "--all", "--junitxml", str(report), *TESTS)
        if finished(("-c", BUILD), environment):
            finished(tests, environment)
        checks = outcomes(report)
    states = ", ".join(f"{check} {state}" for check, state in checks.items())
    print(f"{name}: {time.monotonic() - began:.0f} s; {states}", flush=True)
    return {
        "edge": name,
        "versions": versions,
        "checks": checks,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def finished(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Run Python with ``arguments`` to its end, whatever its exit code; after :data:`SECONDS` it is killed with all its ranks."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=dict(environment), start_new_session=True)
    try:
        process.wait(SECONDS)
        return True
    except subprocess.TimeoutExpired:
        print(f"not done after {SECONDS} s: python {' '.join(arguments)}", flush=True)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def commit() -> str:
    """The commit of this checkout, marked if there are changes on top of it."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def surroundings(name: str, layers: Sequence[Path]) -> dict[str, str]:
    """The environment of an edge's processes. Another DeepSpeed compiles its own op, in a folder of its own."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*layers, ROOT, ROOT / "tests"]))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for folder in layers:
        if folder.name.startswith("deepspeed-"):
            environment["TORCH_EXTENSIONS_DIR"] = str(folder.parent / f"{folder.name}-ops")
    return environment


def versions_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Package -> version, as a process with ``environment`` finds them."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{name: m.version(name) for name in {PACKAGES}}}))"
    found = subprocess.run(
        [sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True, check=True
    )
    return {"python": platform.python_version(), **json.loads(found.stdout)}


def outcomes(report: Path) -> dict[str, str]:
    """Check -> ``ok``, or how many of its tests failed; ``not run`` without a single test that passed."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    states = {}
    for check, marks in CHECKS.items():
        own = [case for case in cases if any(mark in f"{case.get('classname')}.{case.get('name')}" for mark in marks)]
        failed = [case for case in own if case.find("failure") is not None or case.find("error") is not None]
        passed = [case for case in own if case not in failed and case.find("skipped") is None]
        states[check] = f"{len(failed)} failed" if failed else "ok" if passed else "not run"
    return states


def record(rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the rows of the same edges, and write the table."""
    kept = {row["edge"]: row for row in read_rows()} | {row["edge"]: row for row in rows}
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
    PAGE.write_text(with_table(PAGE.read_text(), list(kept.values())))


def read_rows() -> list[dict[str, Any]]:
    """The rows that were kept, in the order in which their edges were first run."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def with_table(text: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page with the table of ``rows`` between its two marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(rows)}{END}{after}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, one line per row."""
    packages, checks = ("python", *PACKAGES), tuple(CHECKS)
    lines = [("run", *packages, *checks, "date, commit"), ("---",) * (len(packages) + len(checks) + 2)]
    for row in rows:
        versions, states = row["versions"], row["checks"]
        found = [versions[package].split("+")[0] for package in packages]
        lines.append((row["edge"], *found, *(states[check] for check in checks), f"{row['date']}, {row['commit']}"))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
