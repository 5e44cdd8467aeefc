# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``gpu``, two per model: time, and memory beside the paper's."""

import statistics
from typing import Any

from benchmarks.offload.tables import every, median_of_base, state_bytes, sum_of_base
from benchmarks.report.table import conditions, median, table

Row = dict[str, Any]
KEY = ("method", "stage", "ranks", "micro_batch", "offload")
# Peak device memory that the GRASS paper (arXiv 2604.07808) reports for one GPU, GB: model -> method.
PAPER = {
    "tinyllama-random": {"grass": 4.49, "lisa": 4.93, "lora": 4.71, "full": 8.76},
    "gemma-2b-random": {"grass": 12.45, "lisa": 13.33, "lora": 11.26, "full": 21.19},
    "llama2-7b-random": {"grass": 19.08, "lisa": 22.31, "lora": 19.97, "full": 51.32},
}


def tables(rows: list[Row]) -> list[str]:
    models = dict.fromkeys(row["model"] for row in rows)
    return [block for model in models for block in _tables(model, [row for row in rows if row["model"] == model])]


def _tables(model: str, rows: list[Row]) -> list[str]:
    """Cases that did not fit say so in the first column of figures."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in KEY), []).append(row)
    titles = ("method", "ZeRO", "GPUs", "batch", "`offload`")
    names = {title: lambda mine, name=name: str(mine[0][name] or "") for title, name in zip(titles, KEY, strict=True)}

    def of_fitting(figure: Any) -> Any:
        return lambda mine: "" if "skipped" in mine[0] else figure(mine)

    def of_none(ratio: Any) -> Any:
        """Against the same method and batch with state on the device."""

        def figure(mine: list[Row]) -> str:
            alike = [row for row in rows if all(row[name] == mine[0][name] for name in KEY[:-1])]
            return ratio(mine, alike) if mine[0]["offload"] is not None else ""

        return of_fitting(figure)

    seconds = {
        **names,
        "median s / step": lambda mine: mine[0].get("skipped") or median(every(mine, "seconds"), 3),
        "tokens/s": of_fitting(lambda mine: f"{_tokens(mine[0]) / statistics.fmean(every(mine, 'seconds')):.0f}"),
        "median, of none": of_none(median_of_base),
        "all steps, of none": of_none(sum_of_base),
    }
    memory = {
        **names,
        "peak, GB": of_fitting(lambda mine: f"{max(row['peak_bytes'] for row in mine) / 1e9:.2f}"),
        "in the paper, GB": lambda mine: _paper(mine[0]),
        "state on device, MB": of_fitting(lambda mine: state_bytes(mine[0], "device")),
        "state on host, MB": of_fitting(lambda mine: state_bytes(mine[0], "host")),
    }
    return [
        f"## GPU: {model}",
        conditions(rows, "gradient checkpointing (non-reentrant), random weights"),
        table(f"{model}: time per step", groups.values(), seconds),
        table(f"{model}: memory of a device", groups.values(), memory),
    ]


def _tokens(row: Row) -> int:
    return row["ranks"] * row["micro_batch"] * row["accumulation"] * row["sequence"]


def _paper(row: Row) -> str:
    """The paper's figure, on one device with the method's own "offload" block."""
    peak = PAPER.get(row["model"], {}).get(row["method"])
    return f"{peak:.2f}" if peak is not None and row["ranks"] == 1 and row["offload"] is None else ""
