# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test run by default, and which only with ``--all``."""

from collections.abc import Iterable
from typing import Any

import pytest


def tiered(cases: Iterable[Any], *by_default: Any) -> list[Any]:
    """``cases`` for ``parametrize``; all but ``by_default`` are marked ``all``."""
    cases = list(cases)
    assert all(case in cases for case in by_default), by_default
    return [_param(case) if case in by_default else _param(case, pytest.mark.all) for case in cases]


def _param(case: Any, *marks: pytest.MarkDecorator) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
