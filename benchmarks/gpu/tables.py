# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``gpu``, one pair per model: time, and memory beside the paper's."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.offload.tables import every, median_of_base, state_bytes, sum_of_base
from benchmarks.report.table import conditions, median, table

Row = dict[str, Any]
# Peak device memory that the GRASS paper (arXiv 2604.07808) reports for one GPU, GB: model -> method.
PAPER = {
    "tinyllama-random": {"grass": 4.49, "lisa": 4.93, "lora": 4.71, "full": 8.76},
    "gemma-2b-random": {"grass": 12.45, "lisa": 13.33, "lora": 11.26, "full": 21.19},
    "llama2-7b-random": {"grass": 19.08, "lisa": 22.31, "lora": 19.97, "full": 51.32},
}


def tables(rows: list[Row]) -> list[str]:
    blocks = []
    for model in dict.fromkeys(row["model"] for row in rows):
        blocks += _tables(model, [row for row in rows if row["model"] == model])
    return blocks


def _tables(model: str, rows: list[Row]) -> list[str]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["stage"], row["ranks"], row["micro_batch"], row["offload"]), []).append(
            row
        )
    lines = list(groups.values())
    names = {
        "method": lambda mine: mine[0]["method"],
        "ZeRO": lambda mine: str(mine[0]["stage"]),
        "GPUs": lambda mine: str(mine[0]["ranks"]),
        "batch": lambda mine: str(mine[0]["micro_batch"]),
        "`offload`": lambda mine: mine[0]["offload"] or "",
    }
    seconds = {
        **names,
        "median s / step": lambda mine: median(_seconds(mine), 3) or mine[0]["skipped"],
        "tokens/s": _tokens_per_second,
        "median, of none": lambda mine: _of_none(mine, rows, median_of_base),
        "all steps, of none": lambda mine: _of_none(mine, rows, sum_of_base),
    }
    memory = {
        **names,
        "peak, GB": lambda mine: f"{max(peaks) / 1e9:.2f}" if (peaks := _peaks(mine)) else "",
        "in the paper, GB": lambda mine: _paper(mine[0]),
        "state on device, MB": lambda mine: "" if "skipped" in mine[0] else state_bytes(mine[0], "device"),
        "state on host, MB": lambda mine: "" if "skipped" in mine[0] else state_bytes(mine[0], "host"),
    }
    return [
        f"## GPU: {model}",
        conditions(rows, "gradient checkpointing (non-reentrant), random weights"),
        table(f"{model}: time per step", lines, seconds),
        table(f"{model}: memory of a device", lines, memory),
    ]


def _seconds(mine: Sequence[Row]) -> list[float]:
    return every([row for row in mine if "skipped" not in row], "seconds")


def _peaks(mine: Sequence[Row]) -> list[float]:
    return [row["peak_bytes"] for row in mine if "skipped" not in row]


def _tokens_per_second(mine: Sequence[Row]) -> str:
    one, seconds = mine[0], _seconds(mine)
    tokens = one["ranks"] * one["micro_batch"] * one["accumulation"] * one["sequence"]
    return f"{tokens / statistics.fmean(seconds):.0f}" if seconds else ""


def _of_none(mine: list[Row], rows: Sequence[Row], ratio: Any) -> str:
    """Against the same method and batch with state on the device."""
    one, timed = mine[0], [row for row in mine if "skipped" not in row]
    if one["offload"] is None or not timed:
        return ""
    alike = ("method", "stage", "ranks", "micro_batch")
    return ratio(timed, [row for row in rows if all(row[name] == one[name] for name in alike)])


def _paper(row: Row) -> str:
    """The paper's figure, on one device with the method's own "offload" block."""
    peak = PAPER.get(row["model"], {}).get(row["method"])
    return f"{peak:.2f}" if peak is not None and row["ranks"] == 1 and row["offload"] is None else ""
