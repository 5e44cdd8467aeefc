# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the whole suite: pools of ranks, kept for the session."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

# Also where there is a GPU: several ranks cannot share it, and the `gpu` tests have a pool of their own.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".torch_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from helpers.ranks import RankPool  # noqa: E402


def _pool(world: int, accelerator: str = "cpu") -> Iterator[RankPool]:
    pool = RankPool(world, accelerator)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def one_rank() -> Iterator[RankPool]:
    yield from _pool(1)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    yield from _pool(2)


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    yield from _pool(4)


@pytest.fixture(scope="session")
def one_gpu() -> Iterator[RankPool]:
    yield from _pool(1, "cuda")
