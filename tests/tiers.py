"""A pytest plugin that closes the run with one line per tier: how many tests, how they ended, how long they took."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import pytest

TIERS = ("front_ends", "slurm", "gpu", "dist", "slow")
_seconds: dict[str, float] = defaultdict(float)
_outcomes: dict[str, Counter[str]] = defaultdict(Counter)


def tier_of(item: pytest.Item) -> str:
    """The first of the tiers that the test is marked with; "unit" without any."""
    return next((tier for tier in TIERS if item.get_closest_marker(tier)), "unit")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    tier = tier_of(item)
    _seconds[tier] += report.duration
    # A passed test counts once, at its call; a failure or a skip may also come from its set-up.
    if report.when == "call" or not report.passed:
        _outcomes[tier][report.outcome] += 1
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("tiers")
    for tier in ("unit", *reversed(TIERS)):
        if tier in _outcomes:
            counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(_outcomes[tier].items()))
            terminalreporter.write_line(f"{tier:<10} {_seconds[tier]:7.1f} s  {counts}")
