# SPDX-License-Identifier: Apache-2.0
"""What README.md quotes: loss, memory and time of the methods that a reader knows, in one small table."""

from collections.abc import Sequence

from benchmarks.case import Row
from benchmarks.frontier.suite import Setting, setting
from benchmarks.frontier.tables import device_bytes, reported
from benchmarks.report import row_groups
from benchmarks.report.row_groups import RowGroup, step_seconds
from benchmarks.report.table import each, mean_deviation, median, table

NAMES = {"full": "full fine-tuning", "lora": "LoRA, r=128", "uniform": "uniform (LISA)", "grass": "**grass**"}
LAYERS = (None, 2, 8)


def readme_table(frontier: Sequence[Row], cpu: Sequence[Row], compute: Sequence[Row]) -> str:
    """Lines of Markdown with the conditions below; empty without rows of ``frontier``."""
    found = {
        one: rows
        for one, rows in reported(frontier).items()
        if one.method in NAMES and one.gamma in LAYERS and one.depth is None
    }
    if not found:
        return ""
    one, steps = frontier[0], {"few": cpu, "many": compute}
    columns = {
        "test loss, GSM8K": lambda one: mean_deviation([row["test_loss"] for row in found[one]]),
        "device memory": lambda one: f"{median([device_bytes(row) for row in found[one]], 2, 1e-9)} GB",
        **{
            f"time / step, {amount} tokens": lambda one, rows=rows: median(_ratios(one, rows))
            for amount, rows in steps.items()
        },
    }
    sizes = " and ".join(
        f"{rows[0]['ranks']} x {rows[0]['micro_batch']} x {rows[0]['sequence']}" for rows in steps.values() if rows
    )
    return (
        f"{table('', sorted(found, key=_order), {'method': _label}, columns)}\n\n"
        f"SmolLM2-135M, {one['dtype']}, {one['device'].upper()}. Loss: {one['steps']} steps, learning rates tuned, "
        f"{max(map(len, found.values()))} seeds, {each(frontier, 'micro_batch')} x {each(frontier, 'sequence')} tokens a step. Memory: by the cost model. "
        f"Time, of full fine-tuning: ranks x rows x tokens {sizes}, ZeRO-2.\n"
    )


def _order(one: Setting) -> tuple[int, bool, int]:
    return one.gamma or 0, bool(one.expansion), list(NAMES).index(one.method)


def _label(one: Setting) -> str:
    layers = f", {one.gamma} layers" if one.gamma else ""
    return NAMES[one.method] + layers + (f", expansion {one.expansion:g}" if one.expansion else "")


def _ratios(one: Setting, rows: Sequence[Row]) -> list[float]:
    """Of full fine-tuning, one per round, in the defaults. All samplers have the same cost, and all coefficients."""
    mine = [row for row in rows if _same_cost(one, row)]
    return RowGroup(row_groups.setting(mine[0]), mine, rows).ratios("full", 2, step_seconds) if mine else []


def _same_cost(one: Setting, row: Row) -> bool:
    if row_groups.setting(row) != row_groups.Setting(row["method"], 2):
        return False
    other = setting(row)
    if one.gamma is None:
        return other.method == one.method
    same_work = (other.gamma or 2, bool(other.expansion), other.depth) == (one.gamma, bool(one.expansion), one.depth)
    return same_work and other.method in ("grass", one.method)
