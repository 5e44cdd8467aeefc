# SPDX-License-Identifier: Apache-2.0
"""The programs of launch/ as a user starts them: under a launcher, or, in less time, as ranks that are forked after one import."""

import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import datasets

from helpers.ranks import FORKED, free_port, rank_environment
from launch.data.rows import Rows

ROOT = Path(__file__).resolve().parents[2]
Started = tuple[int, Callable[[], Any]]


def in_memory(rows: Sequence[dict[str, Any]]) -> Rows:
    return Rows("memory", datasets.Dataset.from_list(list(rows)))


def torchrun(ranks: int) -> list[str]:
    module = [sys.executable, "-m", "torch.distributed.run"]
    return [*module, "--nproc_per_node", str(ranks), "--master_port", str(free_port())]


def train(
    launcher: Sequence[str], options: Sequence[str], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """launch/train.py to its end; its output folder is ``folder/out``."""
    names = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets"), "WANDB_DIR": str(folder)}
    command = [*launcher, "launch/train.py", "--output_dir", str(folder / "out"), *options]
    return subprocess.run(
        command, cwd=ROOT, env={**names, "WANDB_MODE": "offline", **environment}, timeout=300, capture_output=True,
        text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def run_forked(started: Mapping[Path, Started]) -> dict[Path, list[int | None]]:
    """Folder -> exit codes of as many ranks as asked for, each of which calls the function; all folders at the same time.

    What the ranks of a folder print is in its file ``log``.
    """
    with ProcessPoolExecutor(1, mp_context=FORKED) as pool:
        return pool.submit(_fork, started).result()


def _fork(started: Mapping[Path, Started]) -> dict[Path, list[int | None]]:
    import launch.train  # noqa: F401

    processes: dict[Path, list[Any]] = {}
    for folder, (world, function) in started.items():
        port = free_port()
        for rank in range(world):
            arguments = (function, folder, rank_environment(rank, world, port))
            processes.setdefault(folder, []).append(
                multiprocessing.get_context("fork").Process(target=_rank, args=arguments)
            )
            processes[folder][-1].start()
    end = time.monotonic() + 240
    for process in itertools.chain(*processes.values()):
        process.join(max(0.0, end - time.monotonic()))
        process.kill()
        process.join()
    return {folder: [process.exitcode for process in ranks] for folder, ranks in processes.items()}


def _rank(function: Callable[[], Any], folder: Path, environment: Mapping[str, str]) -> None:
    descriptor = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    function()
