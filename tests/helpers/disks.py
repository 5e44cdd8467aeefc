# SPDX-License-Identifier: Apache-2.0
"""Disks that go wrong, and processes that may die of it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def mounted(path: Path, size: int, options: str = "rw") -> Iterator[Path]:
    """A filesystem of ``size`` bytes; skips the test where mounting is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", "none", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def start_python(source: str, *args: object, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Run ``source`` with the package at hand in another process, with more ``environment`` than this one has."""
    command = [sys.executable, "-c", source, *map(str, args)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(environment or {})}, **pipes)


def run_python(source: str, *args: object, timeout: float = 300.0) -> str:
    """What ``source`` printed; fails with its messages if it raised, was aborted or hung."""
    process = start_python(source, *args)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == 0, f"exit code {process.returncode}\n{output}\n{errors}"
    return output


def aio_or_skip() -> None:
    """Skip the test where DeepSpeed's AIO cannot be had."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    try:
        AsyncIOBuilder().load(verbose=False)
    except Exception as error:  # whatever a missing compiler, header or library turns into
        pytest.skip(f"no AIO: {error}")
