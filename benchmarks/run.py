# SPDX-License-Identifier: Apache-2.0
"""Run a suite: one JSON row per case. ``render.py`` makes the tables.

    python benchmarks/run.py --suite cpu         # time, memory and traffic of a step
    python benchmarks/run.py --suite compute     # the same where arithmetic rules
    python benchmarks/run.py --suite quality     # loss and accuracy per method and seed
    python benchmarks/run.py --suite frontier    # loss over memory and time, each setting at its best learning rate
    python benchmarks/run.py --suite samplers    # loss and accuracy per sampler, all else equal
    python benchmarks/run.py --suite levers      # loss with other draws, and other periods
    python benchmarks/run.py --suite epoch       # loss and answers after a pass through the rows of a task
    python benchmarks/run.py --suite offload     # time and memory per "offload" block
    python benchmarks/run.py --suite formats     # loss, time and memory per "state_format"
    python benchmarks/run.py --suite checkpoint  # bytes of a checkpoint, and the time that training stalls
    python benchmarks/run.py --suite gpu         # shapes of TinyLlama, Gemma-2B and LLaMA-2-7B with random weights

Resumable: a case whose row is there is skipped; delete ``benchmarks/rows/<suite>.jsonl`` to start anew. Cases run one
after another and want a quiet machine; ``--jobs`` runs cases of ``quality`` side by side, one core each. A file of
rows holds one precision: bf16 where the hardware computes it, on GPUs without bf16 fp16, else fp32. ``--dtype`` asks
for one; with ``--rows FOLDER`` there is a file for another.
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Lock

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import precision
from benchmarks.case import Case, Request, Row, read_rows
from benchmarks.methods import METHODS
from benchmarks.quality.suite import COMPARED_TASKS, PARTS
from benchmarks.suites import SUITES
from benchmarks.tasks import TASKS
from grass_ds.precision import DTYPES, candidates

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


def run_case(case: Case, timeout: float) -> Row:
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
    parser.add_argument(
        "--task", choices=TASKS, help=f"quality, samplers: this task alone; default: {' and '.join(COMPARED_TASKS)}"
    )
    parser.add_argument("--model", help="instead of the suite's, for a trial; use --rows with it")
    parser.add_argument("--limit", type=int, default=sys.maxsize, help="cases to run at most")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per case")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="end then; cases of epoch go on from their checkpoints next time",
    )
    parser.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    parser.add_argument("--commit", help="of this tree; default: from git")
    parser.add_argument("--nvme-path", type=Path, default=ROOT / ".benchmarks", help="folder on a local disk")
    return parser.parse_args()


def main() -> None:
    args = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
    for name, value in SUITES[args.suite].environment.items():
        os.environ.setdefault(name, value)
    file = args.rows / f"{args.suite}.jsonl"
    for folder in (args.rows, args.nvme_path):
        folder.mkdir(exist_ok=True)
    dtype, commit = choose_precision(args.dtype, file, SUITES[args.suite].dtype), args.commit or current_commit()
    begin, lock, left = time.monotonic(), Lock(), args.limit
    end = begin + 60 * args.minutes

    with tempfile.TemporaryDirectory(dir=args.nvme_path) as disk:

        def measure(case: Case) -> None:
            if (seconds := end - time.monotonic()) <= 0:
                return
            try:
                row = run_case(replace(case, dtype=dtype, disk=disk, data=args.data), min(args.timeout, seconds))
            except subprocess.TimeoutExpired:
                if seconds > args.timeout:
                    raise
                return
            with lock, file.open("a") as rows:
                rows.write(json.dumps({"cell": case.text(), "commit": commit, "jobs": args.jobs, **row}) + "\n")
            print(f"[{time.monotonic() - begin:6.0f} s] {case.text()}", flush=True)

        while time.monotonic() < end and (todo := remaining(args, file)[:left]):
            print(f"{len(todo)} cases to run", flush=True)
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(measure, todo))  # a case that fails ends the suite; those that run are finished
            left -= len(todo)


def remaining(args: argparse.Namespace, file: Path) -> list[Case]:
    """Cases without a row that can run here."""
    rows = read_rows(file)
    parts = (args.part,) if args.part else PARTS
    tasks = (args.task,) if args.task else COMPARED_TASKS
    cases = SUITES[args.suite].cases(Request(rounds=args.rounds, parts=parts, tasks=tasks, rows=rows))
    if args.model is not None:
        cases = [replace(case, model=args.model) for case in cases]
    done = {Case.parse(row["cell"]).text() for row in rows}
    return installed([case for case in cases if case.text() not in done])


def installed(cases: list[Case]) -> list[Case]:
    """The cases that can run here; prints which methods are left out."""
    packages = {case.method: METHODS[case.method].package for case in cases}
    missing = {method: package for method, package in packages.items() if package and find_spec(package) is None}
    for method, package in missing.items():
        print(f"skipped: {method} needs the package {package}, not installed here (pip install {package})", flush=True)
    return [case for case in cases if case.method not in missing]


def choose_precision(asked: str, file: Path, only: str | None = None) -> str:
    """The precision of the cases to run, printed with the reason; ends the program if the user has to decide.

    Args:
        only: the suite says nothing in others; None: it does.
    """
    if only is not None and asked not in (precision.AUTO, only):
        sys.exit(f"error: --dtype {asked}: this suite is about {only}; leave --dtype out")
    asked = only or asked
    try:
        rows = read_rows(file)
        rates = precision.measured({asked, *(row["dtype"] for row in rows)} - {precision.AUTO})
        name, reason = precision.choose(asked, file, rows, rates, candidates())
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"precision: {name}, {reason} ({rates.text()})", flush=True)
    return name


def current_commit() -> str:
    """What is checked out; marked if the code differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.json")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


if __name__ == "__main__":
    main()
