# SPDX-License-Identifier: Apache-2.0
"""Files of rows: ``benchmarks/rows/<suite>.jsonl``, one JSON object per line."""

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(file: Path) -> list[Row]:
    """The rows of a file, none if there is no file. Fields that old rows lack are filled in.

    Raises:
        ValueError: the file holds rows of several precisions, which no table may compare.
    """
    rows = [_complete(json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []
    if len(found := sorted({row["dtype"] for row in rows})) > 1:
        raise ValueError(
            f"{file}: rows of {' and '.join(found)}; a file holds one precision, so keep them in two folders"
        )
    return rows


def _complete(row: Row) -> Row:
    """Rows without these fields are of bf16, and cases of quality then ran two at a time."""
    return {"dtype": "bf16", "jobs": 2 if row["kind"] == "quality" else 1, **row}
