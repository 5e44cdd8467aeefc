# SPDX-License-Identifier: Apache-2.0
"""Values in nested JSON objects by dotted path, as in ``zero_optimization.stage``."""

from collections.abc import Mapping
from typing import Any


def value_at(source: Any, path: str) -> Any:
    """The value at ``path``; None if there is none."""
    for key in path.split("."):
        source = source.get(key) if isinstance(source, Mapping) else None
    return source
