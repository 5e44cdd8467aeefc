# SPDX-License-Identifier: Apache-2.0
"""Run the contract tests and a short cycle of training with other versions of the packages that grass_ds stands on.

    python tests/edges/run.py              every edge of EDGES: overlays of other versions over this environment
    python tests/edges/run.py lowest       one of them
    python tests/edges/run.py --here NAME  this environment as it is: another Python, another torch
    --record                               keep the rows, and write docs/compatibility.md anew

An overlay is a folder made by ``pip install --no-deps --target``, once, in ``.cache/edges``. It stands before the environment's own
packages in ``PYTHONPATH``. An edge is skipped where an overlay is missing and the package index cannot be reached. A skipped edge is no failure.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "edges"
# Not in CACHE: a workflow carries that one to other machines, and ops are compiled for the processor of this one.
OPS = ROOT / ".cache" / "edge_ops"
ROWS = Path(__file__).with_name("rows.jsonl")
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: python tests/edges/run.py --record -->", "<!-- end of table -->"
PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "datasets", "numpy")
RECORDED = (*PACKAGES, "huggingface_hub", "tokenizers")  # in the rows; the table has no column for the last two
SECONDS = 600  # at most for the compilation of DeepSpeed's op, and for the tests of an edge
TEST_SECONDS = 150  # at most for one test, so that a test that hangs is reported before its edge is killed
PIP_SECONDS = 900
BUILD = """
import contextlib, sys
from deepspeed.accelerator import get_accelerator
with contextlib.redirect_stdout(sys.stderr):
    get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
"""
VERSIONS = """
import importlib.metadata, json, sys
found = dict.fromkeys(sys.argv[1:], "none")
for name in found:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""

# The programs in launch/ use Trainer._run_epoch and a warmup_steps below 1. Both came with Transformers 5.3.
LAUNCH_TRANSFORMERS = Version("5.3")

# What each Transformers needs beside it.
LOWEST_TRANSFORMERS = ("transformers==4.51.3", "huggingface_hub==0.36.0", "tokenizers==0.21.4")
LAUNCH_LOWEST_TRANSFORMERS = ("transformers==5.3.0", "huggingface_hub==1.3.0", "tokenizers==0.22.2")
NEWEST_BESIDE = ("huggingface_hub==2.4.0", "tokenizers==0.23.3")
LOWEST_REST = ("accelerate==1.10.0", "datasets==4.0.0", "fsspec==2025.3.0", "dill==0.3.8", "multiprocess==0.70.16")
NEWEST_REST = ("accelerate==1.15.0", "datasets==5.2.0")


FOR_LAUNCH = "lowest for launch/"


def edges_for(python: tuple[int, int]) -> dict[str, tuple[str, ...]]:
    """Edge -> the overlays that make it, under this version of Python."""
    # Transformers 5.21 and later need Python 3.11.
    newest = "transformers==5.24.0" if python >= (3, 11) else "transformers==5.20.2"
    return {
        "lowest": ("deepspeed==0.19.3", *LOWEST_TRANSFORMERS, *LOWEST_REST),
        "newest": ("deepspeed==0.19.8", newest, *NEWEST_BESIDE, *NEWEST_REST),
        FOR_LAUNCH: ("deepspeed==0.19.3", *LAUNCH_LOWEST_TRANSFORMERS, *LOWEST_REST),
    }


EDGES = edges_for(sys.version_info[:2])

# Column of the table -> what a test's id contains.
CHECKS: dict[str, tuple[str, ...]] = {
    "contract": ("test_deepspeed_compat", "test_architecture"),
    "ZeRO-1": ("is_stock[1]", "straight_one[1-"),
    "ZeRO-2": ("is_stock[2]", "straight_one[2-"),
    "ZeRO-3": ("is_stock[3]", "straight_one[3-"),
    "Trainer": ("trainer_cycle", "trainer.test_callback"),
    "launch": ("tests.launch",),
}
# The cycles have names that pytest collects only here: in one environment other tests say more of the same.
TESTS = (
    "tests/edges/cycle.py",
    "tests/edges/trainer_cycle.py",
    "tests/core/test_deepspeed_compat.py",
    "tests/core/test_deepspeed_compat_zero3.py",
    "tests/test_architecture.py",
)
# The callback's own, where launch/, whose Trainer has it too, does not run.
CALLBACK_TESTS = ("tests/trainer/test_callback.py",)
LAUNCH_TESTS = (
    "tests/launch/data/test_tokenization.py",
    "tests/launch/data/test_sources.py",
    "tests/launch/test_model.py",
    "tests/launch/test_dtype.py",
    "tests/launch/test_saving.py",
)
GOOD = ("ok", "-")  # "-": this check is not meant for these versions


class Unreachable(RuntimeError):
    """The package index cannot be reached."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what ``arguments`` ask for; returns the exit code: 1 if a check failed or an overlay could not be installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("edges", nargs="*", metavar="edge", help=f"of: {', '.join(EDGES)}; all if none is named")
    parser.add_argument("--here", metavar="NAME", help="run this environment as it is, under this name")
    parser.add_argument("--record", action="store_true", help="keep the rows and write docs/compatibility.md anew")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.edges if name not in EDGES]:
        parser.error(f"no edge {unknown[0]!r}; there are: {', '.join(EDGES)}")
    here = options.here is not None
    if here and options.edges:
        parser.error("--here runs this environment as it is: name no edges with it")
    if here and options.here in EDGES:
        parser.error(f"--here needs a name of its own: {options.here!r} is an edge")
    names = [options.here] if here else list(dict.fromkeys(options.edges)) or list(EDGES)
    with alone():
        good = [is_good(name, () if here else EDGES[name], here, options.record) for name in names]
    return int(not all(good))


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One run at a time: two of them would install and compile into the same folders."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another run of the edges to end", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for unfinished in CACHE.glob("py*/tmp*"):  # of a run that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        yield


def is_good(name: str, stack: Sequence[str], here: bool, keep: bool) -> bool:
    """Run one edge, and keep its row at once if asked to. False if a check or an installation failed."""
    try:
        overlays = [overlay(requirement) for requirement in stack]
    except Unreachable as reason:
        print(f"{name} skipped: {reason}", flush=True)
        return True
    except RuntimeError as reason:
        print(f"{name} failed: {reason}", flush=True)
        return False
    row = run(name, [folder for folder in overlays if folder is not None], here)
    if keep:
        record([row])
    return all(state in GOOD for state in row["checks"].values())


def overlay(requirement: str) -> Path | None:
    """The folder with one package of exactly this version; None where the environment has it.

    Raises:
        Unreachable: it has to be fetched, and cannot.
        RuntimeError: pip's own words for any other failure.
    """
    name, version = requirement.split("==")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version(name).split("+")[0] == version:
            return None
    folder = CACHE / f"py{sys.version_info.major}{sys.version_info.minor}" / f"{name}-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"fetching {requirement}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        try:
            failure = pip(
                "install", "--no-deps", "--no-build-isolation", "--no-compile", "--target", part, requirement
            )
            # An index that lacks this release answers for pip itself. One that cannot be reached does not.
            unreachable = bool(failure) and bool(pip("download", "--no-deps", "--dest", part, "pip"))
        except subprocess.TimeoutExpired:
            failure, unreachable = "no answer", True
        if unreachable:
            raise Unreachable(f"the package index cannot be reached, and {requirement} is not in {CACHE}")
        if failure:
            raise RuntimeError(f"pip cannot install {requirement}: {failure}")
        Path(part).chmod(0o755)  # a temporary folder is its owner's alone
        Path(part).rename(folder)
        Path(part).mkdir()  # for the context to remove
    return folder


def pip(*arguments: str) -> str:
    """Run pip; one line of its complaint, empty if it has none."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    command += ["--retries", "2", "--timeout", "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS, check=False)
    if not done.returncode:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["failed"]
    # Hints follow the error.
    return next((line for line in reversed(lines) if line.lower().startswith("error")), lines[-1])


def run(name: str, overlays: Sequence[Path], here: bool) -> dict[str, Any]:
    """One row: the versions that were in force, and per check ``ok`` or what was wrong with it."""
    began = time.monotonic()
    environment = surroundings(overlays)
    versions = versions_in(environment)
    environment["TORCH_EXTENSIONS_DIR"] = str(ops_folder(versions, overlays, here))
    print(f"== {name}: " + ", ".join(f"{package} {version}" for package, version in versions.items()), flush=True)
    with_launch = runs_launch(versions["transformers"])
    tests = TESTS + (LAUNCH_TESTS if with_launch else CALLBACK_TESTS)
    if name == FOR_LAUNCH:  # the rest of it is run by the other edges
        tests = ("tests/edges/trainer_cycle.py", *LAUNCH_TESTS)
    options = ("-p", "tiers", "-q", "--all", "-o", f"timeout={TEST_SECONDS}")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        code = None
        remove_stale_locks(Path(environment["TORCH_EXTENSIONS_DIR"]))
        if finished(("-c", BUILD), environment) is not None:
            code = finished(("-m", "pytest", *options, "--junitxml", str(report), *tests), environment)
        checks = outcomes(report, code)
    if not with_launch:
        checks["launch"] = "-"
    if name == FOR_LAUNCH:
        checks |= dict.fromkeys(("contract", "ZeRO-1", "ZeRO-2", "ZeRO-3"), "-")
    seconds = round(time.monotonic() - began)
    states = ", ".join(f"{check} {state}" for check, state in checks.items())
    print(f"{name}: {seconds} s; {states}", flush=True)
    return {
        "edge": name,
        "versions": versions,
        "checks": checks,
        "seconds": seconds,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }


def runs_launch(transformers: str) -> bool:
    """Whether the programs in launch/ work with this version of Transformers."""
    try:
        return Version(transformers) >= LAUNCH_TRANSFORMERS
    except InvalidVersion:  # "none"
        return False


def ops_folder(versions: Mapping[str, str], overlays: Sequence[Path], here: bool) -> Path:
    """Where compiled ops are kept. The environment's own DeepSpeed has them already, every other one gets a folder of its own."""
    if not here and not any(folder.name.startswith("deepspeed-") for folder in overlays):
        return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or ROOT / ".torch_extensions")
    python = "".join(versions["python"].split(".")[:2])
    torch, deepspeed = (versions[name].split("+")[0] for name in ("torch", "deepspeed"))
    return OPS / f"py{python}-torch{torch}-deepspeed{deepspeed}"


def remove_stale_locks(ops: Path) -> None:
    """A build that was killed leaves its lock behind, and every later start waits for it for ever."""
    for lock in ops.glob("*/lock"):
        # OPS is ours alone: no build is under way in it. The environment's folder is everybody's: only an old lock is stale.
        if ops.parent == OPS or time.time() - lock.stat().st_mtime > 2 * SECONDS:
            lock.unlink(missing_ok=True)


def finished(arguments: Sequence[str], environment: Mapping[str, str]) -> int | None:
    """Run Python with ``arguments``; its exit code. After :data:`SECONDS` it is killed with all its ranks, and None returned."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=dict(environment), start_new_session=True)
    try:
        return process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        print(f"not done after {SECONDS} s: python {' '.join(arguments)}", flush=True)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def commit() -> str:
    """The commit of this checkout, marked if there are changes on top of it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        found = ""
    return found or "unknown"


def surroundings(overlays: Sequence[Path]) -> dict[str, str]:
    """The environment of an edge's processes, but for the folder of their ops."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [*overlays, ROOT, ROOT / "tests"]))
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return environment


def versions_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Package -> version, as a process with ``environment`` finds them; "none" for one that is missing."""
    command = [sys.executable, "-c", VERSIONS, *RECORDED]
    found = subprocess.run(command, env=dict(environment), capture_output=True, text=True, check=True)
    return {"python": platform.python_version(), **json.loads(found.stdout)}


def outcomes(report: Path, code: int | None) -> dict[str, str]:
    """Check -> ``ok``, or how many of its tests failed; ``not run`` without a single test that passed.

    ``code`` is pytest's exit code. With one that is neither 0 nor 1 pytest did not come to its end: nothing is ``ok`` then.
    """
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        cases = []
    good = "ok" if code in (0, 1) else f"pytest ended with {code}"
    states = {}
    for check, marks in CHECKS.items():
        own = [case for case in cases if any(mark in f"{case.get('classname')}.{case.get('name')}" for mark in marks)]
        failed = [case for case in own if case.find("failure") is not None or case.find("error") is not None]
        passed = [case for case in own if case not in failed and case.find("skipped") is None]
        states[check] = f"{len(failed)} failed" if failed else good if passed else "not run"
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
        results = [states.get(check, "not run") for check in checks]
        lines.append((row["edge"], *found, *results, f"{row['date']}, {row['commit']}"))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    # The limit of tests/run.sh ends this process with SIGTERM. The exit lets finished() kill the ranks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
