# SPDX-License-Identifier: Apache-2.0
"""What README.md quotes: time, memory and loss of the methods that a reader knows, in one small table."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.report.row_groups import Setting, group_rows, host_state, live_peak, step_seconds
from benchmarks.report.table import each

Row = dict[str, Any]
SHOWN = {
    "full": "full fine-tuning",
    "lora": "LoRA, r=128",
    "uniform": "uniform (LISA), 2 layers",
    "grass": "**grass**, 2 layers",
}
TASKS = {"arithmetic": "GSM8K", "choice": "multiple choice"}


def readme_table(cost: Sequence[Row], quality: Sequence[Row]) -> str:
    """Lines of Markdown with the conditions below; empty without rows of both suites."""
    groups = {one.setting: one for one in group_rows([row for row in cost if row["model"] == "smollm2-135m"])}
    shown = {name: groups[Setting(name, 2)] for name in SHOWN if Setting(name, 2) in groups}
    if not shown or not quality:
        return ""
    names = [
        "method",
        "time / step",
        "device memory",
        "Adam state, host",
        *(f"loss, {name}" for name in TASKS.values()),
    ]
    lines = [names, ["---"] * len(names)]
    for name, one in shown.items():
        state = host_state(one.rows[0]) / 1e9
        lines.append(
            [
                SHOWN[name],
                f"{statistics.median(one.ratios('full', 2, step_seconds)):.2f}",
                f"{statistics.median(one.values(live_peak)) / 1e9:.2f} GB",
                f"{state:.2f} GB" if state else "",
                *(_loss(name, task, quality) for task in TASKS),
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n\n" + _conditions(shown["full"].rows, quality)


def _loss(method: str, task: str, rows: Sequence[Row]) -> str:
    """Mean over seeds of the test loss."""
    found = [
        row["test_loss"]
        for row in rows
        if (row["method"], row["task"]) == (method, task) and row["steps"] and "test_loss" in row
    ]
    return f"{statistics.fmean(found):.3f}" if found else ""


def _conditions(cost: Sequence[Row], quality: Sequence[Row]) -> str:
    one = cost[0]
    compared = [row for row in quality if row["steps"] and "test_loss" in row]
    return (
        f"SmolLM2-135M, {one['dtype']}. Time (of full fine-tuning) and memory per rank: ZeRO-2, {one['ranks']} "
        f"{one['device'].upper()} ranks, micro-batch {one['micro_batch']} x {one['sequence']}. Test loss: "
        f"{each(compared, 'steps')} steps, learning rates tuned, {len({row['seed'] for row in compared})} seeds.\n"
    )
