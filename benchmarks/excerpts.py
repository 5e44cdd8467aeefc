# SPDX-License-Identifier: Apache-2.0
"""What README.md quotes of the cpu suite: a short table and a sentence on ZeRO-3."""

import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.costs import after_switch, host_state, live_peak, plain_seconds
from benchmarks.lineup import Setting, compared, ratios, setting, spread, step_seconds
from benchmarks.methods import METHODS
from benchmarks.places import each, header, line, precision_unlike_bf16

Row = dict[str, Any]
SHOWN = (
    Setting("full", 2),
    Setting("lora", 2),
    Setting("uniform", 2),
    Setting("grass", 2),
    Setting("full", 3),
    Setting("grass", 3),
    Setting("badam-package", 3),
)


def shown(rows: Sequence[Row]) -> list[Row]:
    """Rows of the short table."""
    return [row for row in compared(rows) if setting(row) in SHOWN]


def short_table(rows: Sequence[Row]) -> list[str]:
    """A line per setting of :data:`SHOWN`: seconds and memory of a rank, ratios within a round."""
    cost = compared(rows)
    lines = header(
        "method",
        "ZeRO",
        "s / step",
        "of full, ZeRO-2",
        "of LoRA",
        "tensors on the device, peak",
        "Adam state in host memory, all layers",
        "weights trained per step",
    )
    for one in SHOWN:
        mine = [row for row in cost if setting(row) == one]
        if not mine:
            continue
        cells = [
            one.label,
            str(one.stage),
            spread([step_seconds(row) for row in mine]),
            *(_median(ratios(mine, cost, base, 2, step_seconds)) for base in ("full", "lora")),
            f"{_peak(mine):.2f} GB",
            f"{host_state(mine[0]) / 1e9:.2f} GB" if METHODS[one.method].grass is not None else "",
            f"{mine[0]['trainable'] / 1e6:.1f} M",
        ]
        lines.append(line(cells))
    return lines


def zero3_sentence(rows: Sequence[Row]) -> str:
    """Measured on ZeRO-3, as an indented paragraph; empty without stock ZeRO-3 or grass."""
    cost = compared(rows)
    found = {one: [row for row in cost if setting(row) == one] for one in map(setting, cost)}
    stock, grass = found.get(Setting("full", 3)), found.get(Setting("grass", 3))
    if not stock or not grass:
        return ""
    parts = [
        f"stock ZeRO-3 {_seconds(stock):.2f} s per step and at most {_peak(stock):.2f} GB of tensors on a rank's device"
    ]
    for name, label in (
        ("grass", "`grass`"),
        ("uniform", "`uniform`"),
        (
            "badam-package",
            f"BAdam's own package, one layer instead of two{_every(found.get(Setting('badam-package', 3)))},",
        ),
    ):
        mine = found.get(Setting(name, 3), [])
        # What a step costs depends on the layers drawn: the same rounds, or it is no comparison.
        if {row["seed"] for row in mine} == {row["seed"] for row in grass}:
            ratio = _median(ratios(mine, cost, "full", 3, step_seconds))
            parts.append(f"{label} {_seconds(mine):.2f} s ({ratio} of it) and {_peak(mine):.2f} GB")
    forward = statistics.fmean(value for row in grass for value in row["forward_seconds"])
    timed = [parts["forward"] for parts in plain_seconds(grass)]
    switches = [ratio for row in grass for ratio in after_switch(row)]
    one = grass[0]
    text = (
        f"Measured (SmolLM2-135M{precision_unlike_bf16(one)}, {one['ranks']} {one['device'].upper()} ranks, micro-batch {one['micro_batch']} x {one['sequence']}, a draw every "
        f"{one['grass']['sample_period']} steps, {len({row['seed'] for row in grass})} rounds, commit {each(grass, 'commit', ', ')}): {', '.join(parts)}. "
        f"{forward:.2f} s of a `grass` step are forward"
    )
    text += (
        f", {forward - statistics.fmean(timed):.2f} s more than in plain PyTorch: gathers, and DeepSpeed's hooks."
        if timed
        else "."
    )
    if switches:
        text += f" A step after a switch takes {statistics.median(switches):.2f} of the others' time."
    return indented(text)


def _every(rows: Sequence[Row] | None) -> str:
    return f" (another every {rows[0]['grass']['sample_period']} steps)" if rows else ""


def indented(text: str) -> str:
    """A paragraph within an item of a list; empty if there is nothing to say."""
    return (
        textwrap.fill(text, 140, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False) + "\n"
        if text
        else ""
    )


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f}" if values else ""


def _seconds(rows: Sequence[Row]) -> float:
    return statistics.median(step_seconds(row) for row in rows)


def _peak(rows: Sequence[Row]) -> float:
    """GB of a rank's tensors at most in a step: what a GPU would hold, on the CPU too."""
    return statistics.median(live_peak(row) for row in rows) / 1e9
