# SPDX-License-Identifier: Apache-2.0
"""What README.md quotes: time, memory and loss of the methods that a reader knows, in one small table."""

from collections.abc import Sequence

from benchmarks.case import Row
from benchmarks.report.row_groups import Setting, group_rows, host_state, live_peak, step_seconds
from benchmarks.report.table import each, mean, median, table

SHOWN = {
    "full": "full fine-tuning",
    "lora": "LoRA, r=128",
    "uniform": "uniform (LISA), 2 layers",
    "grass": "**grass**, 2 layers",
}
TASKS = {"arithmetic": "GSM8K", "choice": "multiple choice"}


def readme_table(cost: Sequence[Row], quality: Sequence[Row]) -> str:
    """Lines of Markdown with the conditions below; empty without rows of both suites."""
    if not cost or not quality:
        return ""
    one, trained = cost[0], [row for row in quality if row["steps"] and "test_loss" in row]
    groups = {group.setting: group for group in group_rows(cost)}

    def loss(method: str, task: str) -> str:
        """Mean over seeds of the test loss."""
        return mean((row["test_loss"] for row in trained if (row["method"], row["task"]) == (method, task)), 3)

    columns = {
        "time / step": lambda one: median(one.ratios("full", 2, step_seconds)),
        "device memory": lambda one: f"{median(one.values(live_peak), 2, 1e-9)} GB",
        "Adam state, host": lambda one: f"{state / 1e9:.2f} GB" if (state := host_state(one.rows[0])) else "",
        **{f"loss, {label}": lambda one, task=task: loss(one.setting.method, task) for task, label in TASKS.items()},
    }
    shown = [groups[Setting(method, 2)] for method in SHOWN if Setting(method, 2) in groups]
    return (
        f"{table('', shown, {'method': lambda one: SHOWN[one.setting.method]}, columns)}\n\n"
        f"SmolLM2-135M, {one['dtype']}. Time (of full fine-tuning) and memory per rank: ZeRO-2, {one['ranks']} "
        f"{one['device'].upper()} ranks, micro-batch {one['micro_batch']} x {one['sequence']}. Test loss: "
        f"{each(trained, 'steps')} steps, learning rates tuned, {len({row['seed'] for row in trained})} seeds.\n"
    )
