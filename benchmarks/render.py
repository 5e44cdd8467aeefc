# SPDX-License-Identifier: Apache-2.0
"""Tables from the benchmark rows: ``benchmarks/RESULTS.md``, and the block between the markers of ``README.md``.

python benchmarks/render.py           # write both
python benchmarks/render.py --check   # exit 1 if either differs from its rows
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.places import gpu_note, gpu_table, offload_note, offload_table
from benchmarks.saves import save_note, save_table
from benchmarks.stages import zero3_note, zero3_table

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
RESULTS = FOLDER / "RESULTS.md"
BEGIN, END = "<!-- benchmark table: python benchmarks/render.py -->", "<!-- end of benchmark table -->"
Row = dict[str, Any]

LABELS = {
    "full": "full fine-tuning (stock DeepSpeed)",
    "lora": "LoRA r=128, all linear layers (PEFT)",
    "grass": "**grass**, 2 of 30 layers + final norm (default)",
    "uniform": "uniform (LISA's draw), 2 of 30 layers + final norm",
    "grass-embed": "grass, 2 of 30 layers + final norm + embeddings",
}


def read(suite: str) -> list[Row]:
    path = FOLDER / "rows" / f"{suite}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def group(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(json.dumps(row[k]) if isinstance(row[k], dict) else row[k] for k in keys)].append(row)
    return groups


def conditions(rows: list[Row]) -> str:
    """What all rows of a table share."""
    one = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    drawn = sorted({row["temperature"] for row in rows if row.get("temperature") is not None})
    temperature = f"grass drawn at temperature {', '.join(f'{value:g}' for value in drawn)}; " if drawn else ""
    lengths = " / ".join(str(length) for length in sorted({row["sequence"] for row in rows}))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    stages = " / ".join(f"ZeRO-{stage}" for stage in sorted({row["stage"] for row in rows}))
    return (
        f"{one['model']}, {stages}, {one['ranks']} rank(s) on {one['device']} ({one['hardware']}, {one['threads']} thread each), "
        f"bf16, AdamW, clip 1.0, micro-batch {one['micro_batch']} x {lengths} tokens, accumulation {one['accumulation']}; "
        f"{temperature}{versions}; commit {commits}"
    )


def cost_table(rows: list[Row]) -> list[str]:
    """Seconds per step and memory per method, means over the interleaved rounds: what a step costs depends on the layers drawn."""
    by_method = {key[0]: sorted(found, key=lambda r: r["seed"]) for key, found in group(rows, "method").items()}
    mean = {method: statistics.mean(row["median_seconds"] for row in mine) for method, mine in by_method.items()}
    lines = [
        "| method | s / step | of full | of LoRA | peak RSS per rank | weights trained per step |",
        "|---|---|---|---|---|---|",
    ]
    for method, label in LABELS.items():
        if method not in by_method:
            continue
        mine = by_method[method]
        ratios = [f"{mean[method] / mean[base]:.2f}" for base in ("full", "lora")]
        rounds = [row["median_seconds"] for row in mine]
        seconds = f"{mean[method]:.2f} ({min(rounds):.2f} to {max(rounds):.2f})"
        peak = statistics.median(row["peak_bytes"] for row in mine) / 1e9
        trained = mine[0]["trainable"] / 1e6
        lines.append(f"| {label} | {seconds} | {' | '.join(ratios)} | {peak:.2f} GB | {trained:.1f} M |")
    return lines


def quality_table(rows: list[Row]) -> list[str]:
    """Mean and standard deviation over seeds of loss (and accuracy) on held-out rows."""
    lines = ["| task | method | lr | settings | loss | exact match | seeds |", "|---|---|---|---|---|---|---|"]
    groups = group(rows, "data", "steps", "method", "lr", "grass")
    for (task, steps, method, lr, settings), found in sorted(groups.items()):
        losses = [row["after"]["loss"] for row in found]
        accuracies = [row["after"]["accuracy"] for row in found if "accuracy" in row["after"]]
        label = "(untrained)" if steps == 0 else method
        lines.append(
            f"| {task} | {label} | {lr:g} | {_settings(method, settings)} | {_mean(losses, 3)} | {_mean(accuracies, 2)} | {len(found)} |"
        )
    return lines


def _settings(method: str, settings: str) -> str:
    """What the scored samplers used; the others have neither."""
    values = json.loads(settings)
    shown = {"grass": ("temperature", "ema_alpha"), "static": ("temperature",)}.get(method, ())
    return ", ".join(f"{key} {values[key]:g}" for key in shown if key in values)


def _mean(values: list[float], digits: int) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def section(title: str, rows: list[Row], table: list[str], note: str = "") -> list[str]:
    """Lines of one section: what all rows share, what else is to be known, the table."""
    return [f"## {title}", "", conditions(rows), "", *([note, ""] if note else []), *table, ""]


def results() -> str:
    """The whole of RESULTS.md."""
    cost, quality, offload = read("cpu"), read("quality"), read("offload")
    zero3, gpu, zero3_gpu = read("zero3"), read("gpu"), read("zero3-gpu")
    lines = ["# Results", "", "Generated from `benchmarks/rows/` by `benchmarks/render.py`; do not edit.", ""]
    if cost:
        lines += section("Cost: seconds per step and memory", cost, cost_table(cost))
    if quality:
        note = (
            f"{max(row['steps'] for row in quality)} steps, probing included; every method sees the same rows in the same order. Rows are cut "
            "at the lengths above (arithmetic / gsm8k). The sampler's periods are scaled to the short run: probe 6, sample 6, refresh 12. "
            "Mean and standard deviation over seeds."
        )
        lines += section("Quality: held-out loss and accuracy", quality, quality_table(quality), note)
    if offload:
        lines += section(
            "Offload: seconds per step and memory", offload, offload_table(offload), offload_note(offload)
        )
    if zero3:
        lines += section("ZeRO-3: seconds per step and memory", zero3, zero3_table(zero3), zero3_note(zero3))
    if saves := read("checkpoint"):
        lines += section("Checkpoints: bytes and seconds", saves, save_table(saves), save_note(saves))
    if gpu:
        lines += section(f"GPU: {gpu[0]['model']}", gpu, gpu_table(gpu), gpu_note(gpu))
    if zero3_gpu:
        title = f"ZeRO-3 on GPUs: {zero3_gpu[0]['model']}"
        lines += section(title, zero3_gpu, zero3_table(zero3_gpu), zero3_note(zero3_gpu))
    return "\n".join(lines)


def readme() -> str:
    """README.md with its table replaced."""
    text, cost = README.read_text(), read("cpu")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    body = (
        "\n".join([*cost_table(cost), "", f"Measured by `benchmarks/run.py --suite cpu`: {conditions(cost)}."])
        if cost
        else ""
    )
    return f"{head}{BEGIN}\n{body}\n{END}{tail}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    wanted = {RESULTS: results(), README: readme()}
    if parser.parse_args().check:
        stale = [path.name for path, text in wanted.items() if not path.exists() or path.read_text() != text]
        print("differs from its rows: " + ", ".join(stale) if stale else "tables match their rows")
        return 1 if stale else 0
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
