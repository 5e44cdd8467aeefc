# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``epoch``."""

import statistics

from benchmarks.case import Row
from benchmarks.epoch.suite import ROWS_PER_STEP, RUNS, STEPS
from benchmarks.frontier.suite import setting
from benchmarks.frontier.tables import NAMES
from benchmarks.report.table import conditions, hardware, mean, mean_deviation, median, table


def tables(rows: list[Row]) -> list[str]:
    """Loss, accuracy and cost of every method."""
    order = [setting({"method": method, "grass": keys}) for method, keys, _ in RUNS]
    lines = [(one, mine) for one in order if (mine := [row for row in rows if setting(row) == one])]
    names = {name: lambda line, cell=cell: cell(line[0]) for name, cell in NAMES.items()}
    columns = {
        "lr": lambda line: f"{line[1][0]['lr']:.3g}",
        "test loss": lambda line: mean_deviation([row["test_loss"] for row in line[1]]),
        "exact match, mean": lambda line: mean_deviation(
            [statistics.fmean(row["accuracy"].values()) for row in line[1]]
        ),
        **{
            source: lambda line, source=source: mean_deviation([row["accuracy"][source] for row in line[1]])
            for source in rows[0]["accuracy"]
        },
        "seeds": lambda line: str(len(line[1])),
        "CPU": lambda line: hardware(line[1], among=rows),
        "CPU hours": lambda line: mean(row["cpu_seconds"] / 3600 for row in line[1]),
        "peak RSS, GB": lambda line: median([row["peak_bytes"] for row in line[1]], 2, 1e-9),
    }
    one = rows[0]
    text = f"{STEPS} steps of {ROWS_PER_STEP} rows of GSM8K; {one['test_rows']} test rows, cosine"
    return ["## One epoch", conditions(rows, text), table("Loss, answers, cost", lines, names, columns)]
