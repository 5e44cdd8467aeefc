# SPDX-License-Identifier: Apache-2.0
"""Run a suite: one JSON row per case. ``render.py`` makes the tables.

    python benchmarks/run.py --suite cpu         # time, memory and traffic of a step, and how they grow
    python benchmarks/run.py --suite quality     # loss and accuracy per method and seed
    python benchmarks/run.py --suite offload     # time and memory per "offload" block
    python benchmarks/run.py --suite checkpoint  # bytes of a checkpoint, and the time that training stalls
    python benchmarks/run.py --suite gpu         # shapes of TinyLlama, Gemma-2B and LLaMA-2-7B with random weights

Resumable: a case whose row is there is skipped; delete ``benchmarks/rows/<suite>.jsonl`` to start anew. Cases run one
after another and want a quiet machine; ``--jobs`` runs cases of ``quality`` side by side, one core each. A file of
rows holds one precision: bf16 where the hardware computes it, on GPUs without bf16 fp16, else fp32. ``--dtype`` asks
for one; with ``--rows FOLDER`` there is a file for another.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import precision
from benchmarks.case import Case
from benchmarks.methods import METHODS, missing_package
from benchmarks.quality.suite import PARTS
from benchmarks.report import rows as rowfile
from benchmarks.suite import Request
from benchmarks.suites import SUITES
from benchmarks.tasks import TASKS
from grass_ds.precision import DTYPES

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


def run_case(case: Case, timeout: float) -> dict[str, Any]:
    """Start the ranks of the case and return its row.

    Raises:
        RuntimeError: a rank failed; with the end of what it wrote to stderr.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nproc_per_node", str(case.ranks), "--master_port", str(port)]
        command += [str(FOLDER / "worker.py"), case.text(local=True), str(out)]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as ranks:
            try:
                errors = ranks.communicate(timeout=timeout)[1]
            except BaseException:
                ranks.terminate()  # the launcher ends its ranks, which would disturb what is measured next
                raise
        if ranks.returncode:
            raise RuntimeError(f"{case.text()} failed:\n{errors[-3000:]}")
        return json.loads(out.read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions of the suite, each with its own seed")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--dtype", choices=(precision.AUTO, *DTYPES), default=precision.AUTO, help="of all cases")
    parser.add_argument("--data", help="quality: folder with gsm8k/, arc_easy/, ...: see benchmarks/tasks.py")
    parser.add_argument("--part", choices=PARTS, help="quality: this part alone; it needs the learning rates of tune")
    parser.add_argument("--task", choices=TASKS, help="quality: this task alone; default: all that need --data")
    parser.add_argument("--model", help="instead of the suite's, for a trial; use --rows with it")
    parser.add_argument("--limit", type=int, help="cases to run at most")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per case")
    parser.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    parser.add_argument("--commit", help="of this tree; default: from git")
    parser.add_argument("--nvme-path", type=Path, default=ROOT / ".benchmarks", help="folder on a local disk")
    return parser.parse_args()


def main() -> None:
    args = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
    file = args.rows / f"{args.suite}.jsonl"
    file.parent.mkdir(exist_ok=True)
    dtype, commit = precision_of(args.dtype, file), args.commit or current_commit()
    begin, lock, done = time.monotonic(), Lock(), 0

    with disk_folder(args) as disk:

        def measure(case: Case) -> None:
            row = run_case(replace(case, dtype=dtype, disk=disk, data=args.data), args.timeout)
            with lock, file.open("a") as rows:
                rows.write(json.dumps({"cell": case.text(), "commit": commit, "jobs": args.jobs, **row}) + "\n")
            print(f"[{time.monotonic() - begin:6.0f} s] {case.text()}", flush=True)

        while todo := remaining(args, file)[: None if args.limit is None else args.limit - done]:
            print(f"{len(todo)} cases to run", flush=True)
            with ThreadPoolExecutor(args.jobs) as pool:
                running = [pool.submit(measure, case) for case in todo]
                try:
                    for one in as_completed(running):
                        one.result()
                except BaseException:  # a case that fails ends the suite; those that run are finished
                    pool.shutdown(cancel_futures=True)
                    raise
            done += len(todo)


def remaining(args: argparse.Namespace, file: Path) -> list[Case]:
    """Cases without a row that can run here."""
    rows = rowfile.read(file)
    parts = (args.part,) if args.part else PARTS
    tasks = (args.task,) if args.task else tuple(task for task in TASKS if task != "builtin")
    cases = list(SUITES[args.suite].cases(Request(rounds=args.rounds, parts=parts, tasks=tasks, rows=rows)))
    if args.model is not None:
        cases = [replace(case, model=args.model) for case in cases]
    done = {Case.parse(row["cell"]).text() for row in rows}
    return installed([case for case in cases if case.text() not in done])


def installed(cases: list[Case]) -> list[Case]:
    """The cases that can run here; prints which methods are left out."""
    missing = {method: package for method in METHODS if (package := missing_package(method)) is not None}
    for method in sorted({case.method for case in cases} & missing.keys()):
        package = missing[method]
        print(f"skipped: {method} needs the package {package}, not installed here (pip install {package})", flush=True)
    return [case for case in cases if case.method not in missing]


def precision_of(asked: str, file: Path) -> str:
    """The precision of the cases to run, printed with the reason; ends the program if the user has to decide."""
    try:
        rows, allowed = rowfile.read(file), precision.candidates()
        rates = precision.measured({asked, *(row["dtype"] for row in rows)} - {precision.AUTO})
        choice = precision.choose(asked, file, rows, rates, allowed)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"precision: {choice.name}, {choice.reason} ({rates.text()})", flush=True)
    if choice.warning is not None:
        print(f"warning: {choice.warning}", file=sys.stderr, flush=True)
    return choice.name


def current_commit() -> str:
    """What is checked out; marked if the code differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.json")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


@contextmanager
def disk_folder(args: argparse.Namespace) -> Iterator[str | None]:
    """A new folder on the local disk for the time of the suite, if its cases need one."""
    if not SUITES[args.suite].needs_disk:
        yield None
        return
    args.nvme_path.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.nvme_path) as folder:
        yield folder


if __name__ == "__main__":
    main()
