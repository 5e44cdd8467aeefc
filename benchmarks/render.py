# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from the rows: ``benchmarks/RESULTS.md``, and the table between the markers of ``README.md``.

python benchmarks/render.py            # write all
python benchmarks/render.py --check    # exit 1 if a text differs from its rows
python benchmarks/render.py --rows DIR # from rows in another folder, into that folder
"""

import argparse
import re
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.methods import METHODS
from benchmarks.report.readme_tables import readme_table
from benchmarks.report.rows import read
from benchmarks.suites import SUITES

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
RESULTS = FOLDER / "RESULTS.md"
ROWS = FOLDER / "rows"
BLOCK = re.compile(r"(<!-- benchmark table: .*-->\n).*?(<!-- end of benchmark table -->)", re.DOTALL)
HEAD = """# Results

Generated from `benchmarks/rows/` by `benchmarks/render.py`; do not edit. [README.md](README.md) says how to read the
tables and what was found."""


def results(folder: Path = ROWS) -> str:
    """The whole of RESULTS.md."""
    methods = "\n".join(f"- `{name}`: {method.description}" for name, method in METHODS.items())
    blocks = [HEAD, f"## Methods\n\n{methods}"]
    for name, suite in SUITES.items():
        blocks += suite.tables(read(folder / f"{name}.jsonl"))
    return "\n\n".join(filter(None, blocks)) + "\n"


def readme(folder: Path = ROWS) -> str:
    """README.md with its table replaced."""
    table = readme_table(read(folder / "cpu.jsonl"), read(folder / "quality.jsonl"))
    return BLOCK.sub(lambda found: f"{found[1]}{table}{found[2]}", README.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the rows")
    args = parser.parse_args()
    own = args.rows == ROWS
    texts = {RESULTS if own else args.rows / RESULTS.name: results(args.rows)}
    if own:
        texts[README] = readme()
    if args.check:
        stale = [path.name for path, text in texts.items() if not path.exists() or path.read_text() != text]
        print("differs from its rows: " + ", ".join(stale) if stale else "tables match their rows")
        return 1 if stale else 0
    for path, text in texts.items():
        path.write_text(text)
    plots = (FOLDER if own else args.rows) / "plots"
    plots.mkdir(exist_ok=True)
    for name, suite in SUITES.items():
        if suite.plots is not None:
            suite.plots(read(args.rows / f"{name}.jsonl"), plots)
    return 0


if __name__ == "__main__":
    sys.exit(main())
