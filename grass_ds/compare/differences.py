# SPDX-License-Identifier: Apache-2.0
"""The settings in which runs differ."""

import json
from collections.abc import Sequence
from typing import Any

from grass_ds.compare.saved_run import SavedRun

# Options that name a run rather than decide what it does; the method is in the table of results.
_NAMES = {"method", "output_dir", "logging_dir", "run_name", "resume_from_checkpoint", "deepspeed"}


def differences(runs: Sequence[SavedRun]) -> list[list[str]]:
    """Rows of a setting's name and its value in each run, as JSON; empty where a run does not have it.

    A run whose files lack a source (such as the DeepSpeed config) is not compared in it. ``config`` stands before the
    names in the DeepSpeed config.
    """
    sources = dict.fromkeys(source for run in runs for source in run.settings)
    return [row for source in sources for row in _rows(source, [run.settings.get(source) for run in runs])]


def _rows(source: str, settings: Sequence[dict[str, Any] | None]) -> list[list[str]]:
    names = dict.fromkeys(name for one in settings if one is not None for name in one if name not in _NAMES)
    rows = []
    for name in names:
        values = [None if one is None else _text(one, name) for one in settings]
        if len({value for value in values if value is not None}) > 1:
            shown = f"{source}: {name}" if source == "config" else name
            rows.append([shown, *(value or "" for value in values)])
    # An option may repeat what the report says itself.
    return [list(row) for row in dict.fromkeys(map(tuple, rows))]


def _text(settings: dict[str, Any], name: str) -> str:
    if name not in settings or settings[name] is None:
        return ""
    value = settings[name]
    return value if isinstance(value, str) else json.dumps(value)
