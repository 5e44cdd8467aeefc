# SPDX-License-Identifier: Apache-2.0
"""Sizes in bytes as people write them."""

import re

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes of ``24GB``, ``1.5TB`` or ``80GiB``. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)", text.strip(), re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError("expected a size above 0 with its unit, as in 24GB, 1.5TB or 80GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])
