# SPDX-License-Identifier: Apache-2.0
"""Run a suite of benchmark cells, one JSON row each, and render the tables.

    python benchmarks/run.py --suite cpu        # seconds per step and peak memory, side by side, interleaved
    python benchmarks/run.py --suite quality    # loss and accuracy per method and seed

Resumable: a cell whose row is there is skipped; delete ``benchmarks/rows/<suite>.jsonl`` to start anew. Cells of the ``cpu`` suite run
one after another and want a quiet machine; ``--jobs`` runs cells of ``quality`` side by side, one core each.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
SEEDS = (0, 1, 2)
ROUNDS = 3
STEPS = 40
# Every weight moves at every step under full fine-tuning: it wants a smaller step (2e-4 ended worse, see the rows).
LEARNING_RATE = {"full": 5e-5}
COST_METHODS = ("full", "lora", "grass", "uniform", "grass-embed")
QUALITY_METHODS = ("grass", "uniform", "cyclic", "static", "full")
# Short runs: the sampler's periods are scaled down with them, alike for all methods.
SETTINGS = {"probe_steps": 6, "sample_period": 6, "refresh_period": 12, "temperature": 0.5, "ema_alpha": 0.5}


def cost_cells() -> Iterator[dict[str, Any]]:
    """Rounds outermost, so that a slow minute of the machine hits all methods."""
    for repetition in range(ROUNDS):
        for method in COST_METHODS:
            yield {
                "kind": "cost",
                "method": method,
                "seed": repetition,
                "ranks": 2,
                "micro-batch": 2,
                "sequence": 128,
                "steps": 8,
            }


def quality_cells(gsm8k: str | None) -> Iterator[dict[str, Any]]:
    """All methods on all tasks and seeds, then the sampler's own settings on the built-in task."""
    tasks: list[dict[str, Any]] = [{"data": "builtin:arithmetic", "sequence": 128, "accuracy": True, "test-rows": 60}]
    if gsm8k:
        tasks.append({"data": gsm8k, "sequence": 224, "test-rows": 40})
    common = {"kind": "quality", "ranks": 1, "micro-batch": 2}
    for task in tasks:
        yield {**common, **task, "method": "full", "lr": 2e-4, "seed": 0, "steps": 0, "grass": {}}
    for seed in SEEDS:
        for task in tasks:
            for method in QUALITY_METHODS:
                lr = LEARNING_RATE.get(method, 2e-4)
                yield {**common, **task, "method": method, "lr": lr, "seed": seed, "steps": STEPS, "grass": SETTINGS}
    for task in tasks:
        for changed in ({"temperature": 1.0}, {"temperature": 0.1}, {"ema_alpha": 1.0}):
            for seed in SEEDS:
                grass = {**SETTINGS, **changed}
                yield {**common, **task, "method": "grass", "lr": 2e-4, "seed": seed, "steps": STEPS, "grass": grass}


def key(cell: dict[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)


def run_cell(cell: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Start the cell's ranks and return its row."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            str(cell["ranks"]),
            "--master_port",
            str(port),
        ]
        command += [str(FOLDER / "cell.py"), cell["kind"], "--out", str(out)]
        for name, value in cell.items():
            if name in ("kind", "ranks"):
                continue
            if value is True:
                command.append(f"--{name}")
            else:
                command += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
        done = subprocess.run(command, timeout=timeout, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{key(cell)} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("cpu", "quality"), required=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--gsm8k", help="folder with train.jsonl and test.jsonl of GSM8K, to measure it too")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds per cell")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
    rows = FOLDER / "rows" / f"{args.suite}.jsonl"
    rows.parent.mkdir(exist_ok=True)
    cells = list(cost_cells() if args.suite == "cpu" else quality_cells(args.gsm8k))
    done = {json.loads(line)["cell"] for line in rows.read_text().splitlines()} if rows.exists() else set()
    todo = [cell for cell in cells if name(cell) not in done]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    lock, begin = Lock(), time.monotonic()

    def work(cell: dict[str, Any]) -> None:
        row = {"cell": name(cell), "commit": commit, **run_cell(cell, args.timeout)}
        if "data" in row:
            row["data"] = task_name(row["data"])
        with lock, rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{time.monotonic() - begin:6.0f} s] {name(cell)}", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, todo))


def task_name(data: str) -> str:
    """The task without the machine's path."""
    return data if data.startswith("builtin:") else Path(data).name


def name(cell: dict[str, Any]) -> str:
    return key({k: task_name(v) if k == "data" else v for k, v in cell.items()})


if __name__ == "__main__":
    main()
