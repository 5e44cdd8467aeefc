# SPDX-License-Identifier: Apache-2.0
"""One HTML page about runs, which needs no other file and no network."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from grass_ds.compare import table
from grass_ds.compare.curves import loss_figure
from grass_ds.compare.differences import differences
from grass_ds.compare.saved_run import SavedRun
from grass_ds.trainer.plots import layer_heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1200px; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; } h3 { font-size: 1rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
img { max-width: 100%; height: auto; }
"""
# A browser that obeys it loads nothing from anywhere, whatever is in the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[SavedRun]) -> str:
    """The table, the loss curves, who trained when, and the settings that differ.

    Everything that comes from files is escaped. ImportError: matplotlib is not installed.
    """
    sections = [
        "<h1>Runs compared</h1>",
        _table("results", list(table.COLUMNS), table.rows(runs)),
        "<h2>Training loss</h2>",
        _loss(runs),
        "<h2>Layers trained at each step</h2>",
        *(_layers(run) for run in runs),
        "<h2>Settings that differ</h2>",
        _settings(runs),
    ]
    head = (
        '<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(', '.join(run.name for run in runs))}</title>\n"
        f"<style>{_STYLE}</style>"
    )
    body = "\n".join(sections)
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _loss(runs: Sequence[SavedRun]) -> str:
    missing = [run.name for run in runs if not run.losses]
    note = _paragraph(f"No losses were saved of: {', '.join(missing)}") if missing else ""
    if len(missing) == len(runs):
        return note
    return _image("loss", loss_figure(runs), "Training loss over steps") + note


def _layers(run: SavedRun) -> str:
    heading = f"<h3>{escape(run.name)}</h3>\n"
    if run.history is None or not run.history.rows:
        return heading + _paragraph("No history: the run draws no layers, or had no GrassCallback.")
    return heading + _image("layers", layer_heatmap(run.history), f"Layers of {run.name} trained at each step")


def _settings(runs: Sequence[SavedRun]) -> str:
    rows = differences(runs)
    return _table("settings", ["setting", *(run.name for run in runs)], rows) if rows else _paragraph("None.")


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _table(name: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_row("th", headings), *(_row("td", row) for row in rows)]
    return f'<div class="wide"><table id="{name}">\n' + "\n".join(lines) + "\n</table></div>"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _image(name: str, figure: "Figure", description: str) -> str:
    """The figure as a PNG inside of the page."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{name}" alt="{escape(description)}" src="data:image/png;base64,{data}">'
