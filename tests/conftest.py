# SPDX-License-Identifier: Apache-2.0
"""What the whole suite shares: pools of ranks, kept for the session, and the option ``--all``."""

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

import deepspeed  # noqa: E402, F401  # before transformers: 0.19.3 to 0.19.7 and transformers 4.51 import each other in a circle
from helpers.ranks import RankPool  # noqa: E402

LEFT = pytest.StashKey[int]()


LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_ranks_here() -> Iterator[None]:
    """No test becomes a rank in this process: the programs that later tests start would inherit the variables."""
    before = [os.environ.get(name) for name in LAUNCHER]
    yield
    assert before == [os.environ.get(name) for name in LAUNCHER], "launch.distributed.start() without a process for it"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run also what is marked `all`, `slurm` or `front_ends`")


@pytest.hookimpl(trylast=True)  # what -m and -k take out is not counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out(
        config, items, [item for item in items if item.get_closest_marker("front_ends") and not _has_front_ends()]
    )
    if config.getoption("all"):
        return
    left = [item for item in items if any(map(item.get_closest_marker, ("all", "slurm", "front_ends")))]
    _leave_out(config, items, left)
    config.stash[LEFT] = len(left)


def _leave_out(config: pytest.Config, items: list[pytest.Item], left: list[pytest.Item]) -> None:
    if left:
        items[:] = [item for item in items if item not in set(left)]
        config.hook.pytest_deselected(items=left)


def _has_front_ends() -> bool:
    """Whether tests/front_ends/setup.sh has been run."""
    return Path(os.environ.get("GRASS_FRONT_ENDS") or ROOT / ".cache" / "front_ends").is_dir()


@pytest.hookimpl(trylast=True)  # after the lines of the plugin `tiers`
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if left := terminalreporter.config.stash.get(LEFT, 0):
        terminalreporter.write_line(f"{left} tests are left for --all")


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
