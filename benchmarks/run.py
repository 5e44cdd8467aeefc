# SPDX-License-Identifier: Apache-2.0
"""Run a suite of benchmark cells, one JSON row each; ``render.py`` makes the tables.

    python benchmarks/run.py --suite cpu        # seconds, memory and traffic per step, side by side, interleaved; how they grow
    python benchmarks/run.py --suite quality    # loss and accuracy per method and seed
    python benchmarks/run.py --suite offload    # seconds per step and memory per place of the optimizer state, interleaved
    python benchmarks/run.py --suite gpu        # shapes of TinyLlama, Gemma-2B and LLaMA-2-7B with random weights, on GPUs

Resumable: a cell whose row is there is skipped; delete ``benchmarks/rows/<suite>.jsonl`` to start anew. Cells run one after another
and want a quiet machine; ``--jobs`` runs cells of ``quality`` side by side, one core each. A file of rows holds one precision: bf16 where
the hardware computes it, on GPUs without bf16 fp16, else fp32; ``--dtype`` asks for one. With ``--rows FOLDER`` there is a file for another.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import precision, rowfile
from benchmarks.contest import PARTS, contest_cells
from benchmarks.methods import missing_package
from benchmarks.saves import save_cells
from benchmarks.suites import cpu_cells, gpu_cells, offload_cells
from benchmarks.tasks import TASKS
from grass_ds.precision import DTYPES

COST_SUITES: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "checkpoint": save_cells,
    "cpu": cpu_cells,
    "offload": offload_cells,
    "gpu": gpu_cells,
}
FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent


def key(cell: dict[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)


def arguments(cell: dict[str, Any]) -> list[str]:
    """The cell as the command line of ``cell.py``."""
    words = [cell["kind"]]
    for name, value in cell.items():
        if name in ("kind", "ranks"):
            continue
        if value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def run_cell(
    cell: dict[str, Any], dtype: str, timeout: float, nvme_path: str | None = None, data: str | None = None
) -> dict[str, Any]:
    """Start the cell's ranks and return its row. ``dtype`` is no part of the cell: a file holds rows of one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        launch = [sys.executable, "-m", "torch.distributed.run"]
        launch += ["--nproc_per_node", str(cell["ranks"]), "--master_port", str(port)]
        command = [*launch, str(FOLDER / "cell.py"), *arguments(cell), "--dtype", dtype, "--out", str(out)]
        if nvme_path is not None:
            command += ["--nvme-path", nvme_path]
        if data is not None:
            command += ["--data", data]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as ranks:
            try:
                said = ranks.communicate(timeout=timeout)[1]
            except BaseException:
                ranks.terminate()  # the launcher, which then ends its ranks: they would spoil what is measured next
                raise
        if ranks.returncode:
            raise RuntimeError(f"{key(cell)} failed:\n{said[-3000:]}")
        return json.loads(out.read_text())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("quality", *COST_SUITES), required=True)
    parser.add_argument(
        "--rounds", type=int, default=3, help="repetitions of the whole suite, each with its own seed (not quality)"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--dtype",
        choices=(precision.AUTO, *DTYPES),
        default=precision.AUTO,
        help="of all cells; auto: of the rows that are there, else what the hardware computes",
    )
    parser.add_argument("--data", help="quality: folder with gsm8k/, arc_easy/, ...: see benchmarks/tasks.py")
    parser.add_argument(
        "--part", choices=PARTS, help="quality: only this part; the learning rates of others must be there"
    )
    parser.add_argument("--task", choices=TASKS, help="quality: only this task; default: all that need --data")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per cell")
    parser.add_argument("--rows", type=Path, default=FOLDER / "rows", help="folder of the rows")
    parser.add_argument("--commit", help="of this tree; default: what git says")
    parser.add_argument(
        "--nvme-path",
        type=Path,
        default=ROOT / ".benchmarks",
        help="folder on a local disk: state files are made, and removed, in a new folder in it",
    )
    return parser.parse_args()


def cells_of(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All cells of the suite, as far as the rows that are there tell."""
    if args.suite == "quality":
        tasks = [args.task] if args.task else [task for task in TASKS if task != "builtin"]
        return list(contest_cells([args.part] if args.part else PARTS, tasks, rows))
    return list(COST_SUITES[args.suite](args.rounds))


def installed(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells that can run here; says which methods are left out."""
    for method in sorted({cell["method"] for cell in cells if missing_package(cell["method"])}):
        package = missing_package(method)
        print(f"skipped: {method} needs the package {package}, not installed here (pip install {package})", flush=True)
    return [cell for cell in cells if missing_package(cell["method"]) is None]


def current_commit() -> str:
    """What is checked out; marked if the code differs from it."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], capture_output=True, text=True, cwd=ROOT).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.json")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


@contextmanager
def disk_folder(args: argparse.Namespace) -> Iterator[str | None]:
    """A new folder for state files, if the suite makes any."""
    if args.suite not in ("cpu", "offload", "checkpoint"):
        yield None
        return
    args.nvme_path.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.nvme_path) as folder:
        yield folder


def main() -> None:
    args = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
    file = args.rows / f"{args.suite}.jsonl"
    file.parent.mkdir(exist_ok=True)
    dtype = precision_of(args, file)
    commit, begin, lock = args.commit or current_commit(), time.monotonic(), Lock()

    with disk_folder(args) as disk:
        while todo := left(args, file):
            print(f"{len(todo)} cells to run", flush=True)
            work = partial(
                run_and_note, args=args, dtype=dtype, disk=disk, commit=commit, file=file, lock=lock, begin=begin
            )
            with ThreadPoolExecutor(args.jobs) as pool:
                running = [pool.submit(work, cell) for cell in todo]
                try:
                    for one in as_completed(running):
                        one.result()
                except BaseException:  # a cell that fails ends the suite; those that run are finished
                    pool.shutdown(cancel_futures=True)
                    raise


def precision_of(args: argparse.Namespace, file: Path) -> str:
    """The precision of the cells to run; says why. Ends the program if there is none to go on in."""
    try:
        rows, among = rowfile.read(file), precision.candidates()
        rates = precision.measured({args.dtype, *(row["dtype"] for row in rows)} - {precision.AUTO})
        choice = precision.choose(args.dtype, file, rows, rates, among)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"precision: {choice.name}, {choice.reason} ({rates.text()})", flush=True)
    if choice.warning is not None:
        print(f"warning: {choice.warning}", file=sys.stderr, flush=True)
    return choice.name


def left(args: argparse.Namespace, file: Path) -> list[dict[str, Any]]:
    """Cells without a row."""
    rows = rowfile.read(file)
    done = {row["cell"] for row in rows}
    return installed([cell for cell in cells_of(args, rows) if key(cell) not in done])


def run_and_note(
    cell: dict[str, Any],
    *,
    args: argparse.Namespace,
    dtype: str,
    disk: str | None,
    commit: str,
    file: Path,
    lock: Lock,
    begin: float,
) -> None:
    """Run a cell and write its row."""
    measured = run_cell(cell, dtype, args.timeout, disk, args.data)
    row = {"cell": key(cell), "commit": commit, "jobs": args.jobs, **measured}
    with lock, file.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(f"[{time.monotonic() - begin:6.0f} s] {key(cell)}", flush=True)


if __name__ == "__main__":
    main()
