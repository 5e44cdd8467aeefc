# SPDX-License-Identifier: Apache-2.0
"""Tables from the rows: ``benchmarks/RESULTS.md``, and the table between the markers of ``README.md``; pictures.

python benchmarks/render.py            # write all
python benchmarks/render.py --rows DIR # from rows in another folder: RESULTS.md in that folder
"""

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.case import read_rows
from benchmarks.frontier import figure
from benchmarks.methods import METHODS
from benchmarks.report.readme_table import readme_table
from benchmarks.suites import SUITES

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
ROWS = FOLDER / "rows"
RESULTS = FOLDER / "RESULTS.md"
BLOCK = re.compile(r"(<!-- benchmark table: .*-->\n).*?(<!-- end of benchmark table -->)", re.DOTALL)
HEAD = """# Results

Generated from `benchmarks/rows/` by `benchmarks/render.py`; do not edit. [README.md](README.md) says how to read the
tables and what was found. Finished studies: [STUDIES.md](STUDIES.md)."""


def results(folder: Path = ROWS) -> str:
    """The whole of RESULTS.md."""
    methods = "\n".join(f"- `{name}`: {method.description}" for name, method in METHODS.items())
    blocks = [HEAD, f"## Methods\n\n{methods}"]
    for name, suite in SUITES.items():
        if rows := read_rows(folder / f"{name}.jsonl"):
            blocks += suite.tables(rows)
    return "\n\n".join(filter(None, blocks)) + "\n"


def readme(folder: Path = ROWS) -> str:
    """README.md with its table replaced."""
    table = readme_table(*(read_rows(folder / f"{name}.jsonl") for name in ("frontier", "cpu", "compute")))
    return BLOCK.sub(lambda found: f"{found[1]}{table}{found[2]}", README.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the rows")
    rows = parser.parse_args().rows
    folder = FOLDER if rows == ROWS else rows
    (folder / RESULTS.name).write_text(results(rows))
    figure.save(read_rows(rows / "frontier.jsonl"), folder / "plots" / "frontier.png")
    if rows == ROWS:
        README.write_text(readme())
