# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m grass_ds compare`` from its arguments to its text."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from grass_ds.compare import table
from grass_ds.compare.curves import loss_figure
from grass_ds.compare.differences import differences
from grass_ds.compare.page import page
from grass_ds.compare.saved_run import SavedRun, load_all
from grass_ds.core.durable_files import replace_file


def compare(folders: Sequence[str], plot: str | None = None, html: str | None = None) -> str:
    """The table of these runs and the settings that differ, as text; writes the files that are asked for.

    Args:
        plot: an image file for the loss curves; its suffix is the format (.png).
        html: a file for one page with everything.

    Raises:
        ValueError: a folder without a run, a damaged file, no loss to plot, or matplotlib is not installed.
        OSError: a file cannot be written.
    """
    runs = load_all(folders)
    for option, file in (("--plot", plot), ("--html", html)):
        if file is not None and find_spec("matplotlib") is None:
            raise ValueError(
                f"{option} needs matplotlib, which is not installed: pip install matplotlib (extra 'plots' of grass_ds)"
            )
        if file is not None and not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{option} {file}: no such folder; make it, or choose another")
    if plot is not None:
        loss_figure(runs).savefig(plot, dpi=150)
    if html is not None:
        replace_file(Path(html), page(runs))
    return _text(runs)


def _text(runs: Sequence[SavedRun]) -> str:
    text = table.as_text(list(table.COLUMNS), table.rows(runs))
    if len(runs) == 1:
        return text
    rows = differences(runs)
    if not rows:
        return text + "\n\nno settings differ"
    return text + "\n\n" + table.as_text(["settings that differ", *(run.name for run in runs)], rows)
