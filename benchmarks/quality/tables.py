# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``quality``, a section per task. ``README.md`` says how to read them."""

import statistics
from collections.abc import Callable, Sequence

from benchmarks.case import Row
from benchmarks.quality.suite import COMPARED, RATES, SETTINGS, STEPS, TUNING_SEED, best_rates, tried_rates
from benchmarks.report.table import conditions, each, interval, mean, mean_deviation, median, table
from benchmarks.tasks import ROWS, TASKS

# Methods whose losses are subtracted, within a seed.
PAIRS = (
    ("grass", "uniform"),
    ("grass-sharp", "uniform"),
    ("grass", "full"),
    ("grass", "lora"),
    ("grass", "static"),
    ("grass-embed", "grass"),
)


def tables(rows: list[Row]) -> list[str]:
    """A section per task with rows."""
    blocks = []
    for task in TASKS:
        if mine := [row for row in rows if row["task"] == task]:
            compared = [row for row in mine if "test_loss" in row]
            blocks += [
                f"## Quality: task `{task}`",
                conditions(mine, *task_conditions(task, mine)),
                rate_table(task, mine),
            ]
            blocks += [*result_tables(compared), *pair_tables(compared)]
    return blocks


def task_conditions(task: str, rows: Sequence[Row]) -> list[str]:
    """What the rows of a task share, for ``report.table.conditions``."""
    one, exam = rows[0], TASKS[task]
    answers = "exact match of generated numbers" if exam.exact else "the most likely option"
    counts = next((row["train_rows"] for row in rows if "train_rows" in row), {})
    shares = [f"{source} ({count / sum(counts.values()):.0%} of the rows)" for source, count in counts.items()]
    return [
        f"trained on {', '.join(shares if len(shares) > 1 else exam.train)}; fingerprint {each(rows, 'data')}",
        f"{STEPS} steps, of which the first ones probe; {', '.join(f'`{name}` {n}' for name, n in SETTINGS.items())}",
        f"loss: {one['dev_rows']} development rows, {one['test_rows']} test rows",
        f"accuracy: {answers}, {exam.answered(ROWS)} test rows per source",
    ]


def rate_table(task: str, rows: Sequence[Row]) -> str:
    """Development loss per method and learning rate; the least is bold once no other rate is to be tried."""
    best, tried = best_rates(task, rows), tried_rates(task, rows)

    def loss(method: str, lr: float) -> str:
        text = f"{tried[method][lr]:.3f}" if lr in tried[method] else ""
        return f"**{text}**" if best.get(method) == lr else text

    columns = {f"{lr:g}": lambda method, lr=lr: loss(method, lr) for lr in RATES}
    shown = [method for method in COMPARED if method in tried]
    return table(f"Development loss by learning rate, seed {TUNING_SEED}", shown, {"method": str}, columns)


def result_tables(rows: Sequence[Row]) -> list[str]:
    """Losses, accuracies and costs of every method."""
    found = {"(untrained)": [row for row in rows if not row["steps"]]}
    found |= {method: [row for row in rows if row["method"] == method and row["steps"]] for method in COMPARED}
    lines = [(name, mine) for name, mine in found.items() if mine]
    runs = [line for line in lines if line[1][0]["steps"]]
    names = {"method": lambda line: line[0]}
    accuracies = [(name, [row["accuracy"] for row in mine]) for name, mine in lines]
    if constant := next((row["constant"] for row in rows if row.get("constant")), None):
        accuracies.insert(1, ("(most frequent answer)", [constant]))
    losses = {
        "lr": lambda line: f"{line[1][0]['lr']:g}" if line[1][0]["steps"] else "",
        "test loss": lambda line: mean_deviation([row["test_loss"] for row in line[1]]),
        "development loss": lambda line: mean_deviation([row["dev_loss"] for row in line[1]]),
        "seeds": lambda line: str(len(line[1])),
    }
    accuracy = {
        "mean": lambda line: mean_deviation([statistics.fmean(one.values()) for one in line[1]]),
        **{
            source: lambda line, source=source: mean_deviation([one[source] for one in line[1]])
            for source in (rows[0]["accuracy"] if rows else ())
        },
    }
    cost = {
        "CPU s / step": lambda line: (
            mean(row["cpu_seconds"] / row["steps"] for row in line[1]) if comparable_seconds(line[1], rows) else ""
        ),
        "peak RSS, GB": lambda line: median([row["peak_bytes"] for row in line[1]], 2, 1e-9),
        "weights trained, M": lambda line: f"{line[1][0]['trainable'] / 1e6:.1f}",
    }
    return [
        table("Loss, nats per answer token", lines, names, losses),
        table("Accuracy", accuracies, names, accuracy),
        table("Cost of the runs", runs, names, cost),
    ]


def comparable_seconds(mine: Sequence[Row], rows: Sequence[Row]) -> bool:
    """Whether these rows ran on the commits and machines of ``grass``: seconds of other days do not compare."""

    def measured_at(row: Row) -> tuple[str, str, int, int]:
        return row["commit"], row["hardware"], row["threads"], row["jobs"]

    return set(map(measured_at, mine)) <= {measured_at(row) for row in rows if row["method"] == "grass"}


def pair_tables(rows: Sequence[Row]) -> list[str]:
    """Differences of two methods, one per seed that both have: in the loss less is better, in the accuracy more is."""
    runs = {(row["method"], row["seed"]): row for row in rows if row["steps"]}
    seeds = sorted({row["seed"] for row in rows})
    found = {
        f"{left} - {right}": [
            (runs[left, seed], runs[right, seed]) for seed in seeds if {(left, seed), (right, seed)} <= runs.keys()
        ]
        for left, right in PAIRS
    }

    def columns(measure: Callable[[Row], float]) -> dict[str, Callable[[str], str]]:
        differences = {
            name: [measure(ours) - measure(theirs) for ours, theirs in both] for name, both in found.items()
        }
        return {
            "mean": lambda name: mean_deviation(differences[name], "+"),
            "seed by seed": lambda name: ", ".join(f"{value:+.3f}" for value in differences[name]),
            "95 % interval of the mean": lambda name: interval(differences[name]),
        }

    shown, names = [name for name, both in found.items() if both], {"difference": str}
    accuracy = columns(lambda row: statistics.fmean(row["accuracy"].values()))
    return [
        table("Test loss: differences within a seed", shown, names, columns(lambda row: row["test_loss"])),
        table("Accuracy: differences within a seed", shown, names, accuracy),
    ]
