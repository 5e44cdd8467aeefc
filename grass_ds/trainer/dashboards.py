# SPDX-License-Identifier: Apache-2.0
"""Values and plots for wandb, beside the Trainer's own log lines. On global rank 0."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.integrations import rewrite_logs


def add_to_wandb_row(values: Mapping[str, float | str]) -> None:
    """Add values to the row that the Trainer's wandb callback logs next, so that one row per step holds everything."""
    if (wandb := _active_wandb()) is not None:
        wandb.log(rewrite_logs(dict(values)), commit=False)


def log_plots_to_wandb(paths: Sequence[Path]) -> None:
    """Upload PNG files as ``grass/<name>``."""
    if paths and (wandb := _active_wandb()) is not None:
        wandb.log({f"grass/{path.stem}": wandb.Image(os.fspath(path)) for path in paths})


def _active_wandb() -> Any:
    """The module wandb if this process has an active run, else None; never imported for this."""
    wandb = sys.modules.get("wandb")
    return None if wandb is None or wandb.run is None else wandb
