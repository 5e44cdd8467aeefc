# SPDX-License-Identifier: Apache-2.0
"""Tables and plots from the benchmark rows: ``benchmarks/RESULTS.md``, and the blocks between the markers of ``README.md``.

python benchmarks/render.py            # write all
python benchmarks/render.py --check    # exit 1 if a text differs from its rows
python benchmarks/render.py --rows DIR # the same from rows in another folder, into that folder
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import curves, rowfile, standings
from benchmarks.aims import aims_table
from benchmarks.costs import FLOOR_NOTE, cost_note, floor_table, memory_table, time_table
from benchmarks.excerpts import indented, short_table, shown, zero3_sentence
from benchmarks.growth import draw_growth, growth_images, growth_note, growth_table
from benchmarks.lineup import compared, growing
from benchmarks.places import each, gpu_note, gpu_table, offload_note, offload_sentence, offload_table, threads
from benchmarks.reached import reached_block
from benchmarks.saves import save_note, save_sentence, save_table

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
RESULTS = FOLDER / "RESULTS.md"
ROWS = FOLDER / "rows"
Row = dict[str, Any]


def read(suite: str, folder: Path = ROWS) -> list[Row]:
    """Rows of a suite; none if it has not been run."""
    return rowfile.read(folder / f"{suite}.jsonl")


def conditions(rows: Sequence[Row]) -> str:
    """What the rows of a table share."""
    one = rows[0]
    versions = {name: version for row in rows for name, version in row["versions"].items()}
    drawn = [row for row in rows if row["temperature"] is not None]
    temperature = f"grass drawn at temperature {each(drawn, 'temperature')}; " if drawn else ""
    stages = " / ".join(f"ZeRO-{stage}" for stage in sorted({row["stage"] for row in rows}))
    return (
        f"{one['model']}, {stages}, {each(rows, 'ranks')} rank(s) on {one['device']} ({each(rows, 'hardware')}, {threads(rows)} each), "
        f"{one['dtype']}, AdamW, clip 1.0, micro-batch {each(rows, 'micro_batch')} x {each(rows, 'sequence')} tokens, accumulation "
        f"{each(rows, 'accumulation')}; {temperature}{', '.join(f'{name} {version}' for name, version in versions.items())}; "
        f"commit {each(rows, 'commit', ', ')}"
    )


def section(title: str, rows: Sequence[Row], *parts: str | list[str]) -> list[str]:
    """Lines of one section: what all rows share, then notes, tables and images."""
    lines = [f"## {title}", "", conditions(rows), ""]
    for part in parts:
        lines += [*([part] if isinstance(part, str) else part), ""]
    return lines


def results(folder: Path = ROWS) -> str:
    """The whole of RESULTS.md."""
    cpu, offload, saves, gpu = (read(suite, folder) for suite in ("cpu", "offload", "checkpoint", "gpu"))
    lines = ["# Results", "", "Generated from `benchmarks/rows/` by `benchmarks/render.py`; do not edit.", ""]
    if cost := compared(cpu):
        tables = [
            *("### Aims", aims_table(cpu), "### Time", time_table(cpu), "### Memory and traffic", memory_table(cpu)),
            *("### Measured against the floor", FLOOR_NOTE, floor_table(cpu)),
        ]
        lines += section("Cost of a step, side by side", cost, cost_note(cpu), *tables)
    if shapes := growing(cpu):
        lines += [
            "## How cost grows",
            "",
            growth_note(shapes),
            "",
            *growth_table(shapes),
            "",
            *growth_images(shapes),
            "",
        ]
    lines += standings.sections(read("quality", folder))
    if offload:
        lines += section(
            "Offload: seconds per step and memory", offload, offload_note(offload), offload_table(offload)
        )
    if saves:
        lines += section("Checkpoints: bytes and seconds", saves, save_note(saves), save_table(saves))
    for model in dict.fromkeys(row["model"] for row in gpu):
        mine = [row for row in gpu if row["model"] == model]
        lines += section(f"GPU: {model}", mine, gpu_note(mine), gpu_table(mine))
    return "\n".join(lines)


def readme(folder: Path = ROWS) -> str:
    """README.md with its blocks replaced."""
    text = README.read_text()
    for name, (suite, block) in BLOCKS.items():
        begin, end = f"<!-- benchmark {name}: python benchmarks/render.py -->\n", f"<!-- end of benchmark {name} -->"
        head, rest = text.split(begin)
        body, tail = rest.split(end)
        indent = body.rpartition("\n")[2]
        text = f"{head}{begin}{block(read(suite, folder))}{indent}{end}{tail}"
    return text


def _table_block(cpu: Sequence[Row]) -> str:
    if not (rows := shown(cpu)):
        return ""
    return "\n".join([*short_table(cpu), "", f"Measured by `benchmarks/run.py --suite cpu`: {conditions(rows)}.", ""])


# name in the markers -> suite, what is between them
BLOCKS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "table": ("cpu", _table_block),
    "zero3": ("cpu", zero3_sentence),
    "offload": ("offload", lambda rows: indented(offload_sentence(rows))),
    "checkpoint": ("checkpoint", lambda rows: indented(save_sentence(rows))),
    "quality": ("quality", reached_block),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the rows")
    args = parser.parse_args()
    wanted = {RESULTS: results(args.rows), README: readme(args.rows)}
    if args.check:
        stale = [path.name for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        print("differs from its rows: " + ", ".join(stale) if stale else "tables match their rows")
        return 1 if stale else 0
    own = args.rows == ROWS
    for path, text in wanted.items():
        (path if own else args.rows / path.name).write_text(text)
    plots = (FOLDER if own else args.rows) / "plots"
    plots.mkdir(exist_ok=True)
    draw_growth(growing(read("cpu", args.rows)), plots)
    list(curves.draw(read("quality", args.rows), plots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
