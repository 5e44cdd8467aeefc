# SPDX-License-Identifier: Apache-2.0
"""Differences between quality runs: of methods within a seed, of draws, with the length, with one setting changed."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.quality.equal_budget import step_flops
from benchmarks.quality.suite import CHANGES, COMPARED, DRAWN, SETTINGS, STEPS
from benchmarks.report.table import interval, listed, mean, mean_deviation, table

Row = dict[str, Any]
PAIRS = (
    ("grass", "uniform"),
    ("grass-sharp", "uniform"),
    ("grass", "full"),
    ("grass", "lora"),
    ("grass", "static"),
    ("grass-embed", "grass"),
)


def trained(rows: Sequence[Row], method: str) -> list[Row]:
    """Rows of a method by seed, without the untrained model."""
    return sorted((row for row in rows if row["method"] == method and row["steps"]), key=lambda row: row["seed"])


def pairs(rows: Sequence[Row], left: str, right: str) -> list[tuple[Row, Row]]:
    """Rows of both methods, for every seed that both have."""
    ours, theirs = ({row["seed"]: row for row in trained(rows, method)} for method in (left, right))
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def mean_accuracy(row: Row) -> float:
    return statistics.fmean(row["accuracy"].values())


def distance_from_uniform(row: Row) -> float | None:
    """Total variation between the draw's distribution and the uniform one, in [0, 1]; mean over the run.

    None for methods without scores.
    """
    found = [
        sum(abs(p - 1 / len(drawn["probabilities"])) for p in drawn["probabilities"]) / 2
        for drawn in row.get("scores") or ()
    ]
    return statistics.fmean(found) if found else None


def shared_layers(ours: Row, theirs: Row) -> float | None:
    """Share of the layers that ``theirs`` trained in a step that ``ours`` trained in the same step; without probing.

    None for methods that do not draw, and for runs of different lengths.
    """
    if not ours["active"] or len(ours["active"]) != len(theirs["active"]):
        return None
    steps = [
        (set(mine), set(other))
        for mine, other in zip(ours["active"], theirs["active"], strict=True)
        if mine is not None and other is not None
    ]
    return sum(len(mine & other) for mine, other in steps) / sum(len(other) for _, other in steps) if steps else None


class Pair(NamedTuple):
    """Differences between two methods, one per seed."""

    name: str
    rows: list[tuple[Row, Row]]

    def differences(self, measure: Callable[[Row], float]) -> list[float]:
        return [measure(ours) - measure(theirs) for ours, theirs in self.rows]


def pair_tables(rows: Sequence[Row]) -> list[str]:
    """Differences within a seed: in the loss less is better, in the accuracy more is."""
    found = [Pair(f"{left} - {right}", pairs(rows, left, right)) for left, right in PAIRS]
    found = [pair for pair in found if pair.rows]

    def columns(measure: Callable[[Row], float]) -> dict[str, Callable[[Pair], str]]:
        return {
            "difference": lambda pair: pair.name,
            "mean": lambda pair: mean_deviation(pair.differences(measure), "+"),
            "seed by seed": lambda pair: listed(pair.differences(measure)),
        }

    loss = columns(lambda row: row["test_loss"])
    loss["95 % interval of the mean"] = lambda pair: interval(pair.differences(lambda row: row["test_loss"]))
    loss["layers shared"] = lambda pair: mean([shared_layers(*both) for both in pair.rows])
    return [
        table("Test loss: differences within a seed", found, loss),
        table("Accuracy: differences within a seed", found, columns(mean_accuracy)),
    ]


def redrawn_tables(rows: Sequence[Row]) -> list[str]:
    """Development losses with other seeds of the sampler on the same rows, and their differences draw by draw."""
    runs = {
        method: {(row["seed"], row["grass"]["seed"]): row["dev_loss"] for row in trained(_redrawn(rows), method)}
        for method in DRAWN
    }
    theirs, ours = (runs[method] for method in DRAWN)
    both = {draw: ours[draw] - theirs[draw] for draw in sorted(ours.keys() & theirs.keys())}
    seeds = sorted({row["seed"] for row in _redrawn(rows)})

    def of_seed(found: dict[tuple[int, int], float], seed: int) -> list[float]:
        return [value for (one, _), value in sorted(found.items()) if one == seed]

    losses = table(
        "Other draws: development loss",
        [method for method in DRAWN if runs[method]],
        {
            "method": lambda method: method,
            **{f"seed {s}": lambda method, s=s: mean_deviation(of_seed(runs[method], s)) for s in seeds},
            "all": lambda method: mean_deviation(list(runs[method].values())),
            "runs": lambda method: str(len(runs[method])),
        },
    )
    differences = table(
        f"Other draws: {DRAWN[1]} - {DRAWN[0]}",
        [(f"seed {seed}", of_seed(both, seed)) for seed in seeds] + [("all", list(both.values()))] if both else [],
        {
            "rows": lambda line: line[0],
            "mean": lambda line: mean_deviation(line[1], "+"),
            "draw by draw": lambda line: listed(line[1]) if line[0] != "all" else "",
            "95 % interval of the mean": lambda line: interval(line[1]) if line[0] == "all" else "",
        },
    )
    return [losses, differences]


def _redrawn(rows: Sequence[Row]) -> list[Row]:
    """Runs with a seed of the sampler's own."""
    return [row for row in rows if "seed" in row["grass"]]


def longer_tables(rows: Sequence[Row], short: Sequence[Row]) -> list[str]:
    """Development losses along longer runs, beside the short run with the same seed."""
    if not rows:
        return []
    (steps,) = {tuple(point["step"] for point in row["curve"]) for row in rows}

    def short_loss(row: Row) -> str:
        return mean([one["dev_loss"] for one in trained(short, row["method"]) if one["seed"] == row["seed"]], 3)

    losses = table(
        f"Development loss along {steps[-1]} steps",
        sorted(rows, key=lambda row: COMPARED.index(row["method"])),
        {
            "method": lambda row: row["method"],
            "seed": lambda row: str(row["seed"]),
            "lr": lambda row: f"{row['lr']:g}",
            **{
                f"after {step}": lambda row, index=index: f"{row['curve'][index]['dev_loss']:.3f}"
                for index, step in enumerate(steps)
            },
            f"in a run of {STEPS}": short_loss,
            "TFLOP": lambda row: f"{sum(step_flops(row)) / 1e12:.0f}",
        },
    )
    pair = Pair(f"{DRAWN[1]} - {DRAWN[0]}", pairs(rows, DRAWN[1], DRAWN[0]))
    difference = table(
        f"Development loss after {steps[-1]} steps: difference within a seed",
        [pair] if pair.rows else [],
        {
            "difference": lambda one: one.name,
            "mean": lambda one: mean_deviation(one.differences(lambda row: row["dev_loss"]), "+"),
            "seed by seed": lambda one: listed(one.differences(lambda row: row["dev_loss"])),
        },
    )
    return [losses, difference]


def change_tables(rows: Sequence[Row], unchanged: Sequence[Row]) -> list[str]:
    """Development loss against ``grass`` with nothing changed, within a seed; and what else the change does.

    The loss with nothing changed is the mean over its draws, as the luck of one draw would be in every line.
    """
    changed = [row for row in rows if row["method"] == "grass" and 0 < row["steps"] <= STEPS and _change(row)]
    seeds = {row["seed"] for row in changed}
    bases = {row["seed"]: [row] for row in unchanged if row["seed"] in seeds}
    for row in _redrawn(rows):
        if row["method"] == "grass" and row["seed"] in bases:
            bases[row["seed"]].append(row)
    losses = {seed: statistics.fmean(row["dev_loss"] for row in runs) for seed, runs in bases.items()}
    flops = {seed: statistics.fmean(sum(step_flops(row)) for row in runs) for seed, runs in bases.items()}
    found = {"nothing; its draws": [row for runs in bases.values() if len(runs) > 1 for row in runs]}
    found |= {_label(change): [] for change in CHANGES}
    for row in changed:
        if row["seed"] in bases and "seed" not in row["grass"]:
            found.setdefault(_label(_change(row)), []).append(row)
    lines = [(label, mine) for label, mine in found.items() if mine]

    def differences(mine: Sequence[Row], seed: int | None = None) -> list[float]:
        return [row["dev_loss"] - losses[row["seed"]] for row in mine if seed in (None, row["seed"])]

    def shared(mine: Sequence[Row]) -> list[float | None]:
        firsts = {seed: runs[0] for seed, runs in bases.items()}
        return [shared_layers(row, firsts[row["seed"]]) for row in mine if row is not firsts[row["seed"]]]

    names = {"changed": lambda line: line[0]}
    loss = {
        **names,
        "mean": lambda line: mean_deviation(differences(line[1]), "+"),
        **{f"seed {seed}": lambda line, s=seed: listed(differences(line[1], s)) for seed in sorted(bases)},
        "runs": lambda line: str(len(line[1])),
    }
    more = {
        **names,
        "FLOPs, of unchanged": lambda line: (
            f"{sum(sum(step_flops(row)) for row in line[1]) / sum(flops[row['seed']] for row in line[1]):.2f}"
        ),
        "draw, from uniform": lambda line: mean(map(distance_from_uniform, line[1])),
        "layers shared": lambda line: mean(shared(line[1])),
    }
    return [
        table("One setting of grass changed: development loss", lines, loss),
        table("One setting of grass changed: cost and draws", lines, more),
    ]


def _change(row: Row) -> Row:
    """What differs from :data:`SETTINGS` and :data:`STEPS`; options that are gone are still in old rows."""
    settings = {name: value for name, value in row["grass"].items() if SETTINGS.get(name) != value}
    return settings | ({"steps": row["steps"]} if row["steps"] != STEPS else {})


def _label(change: Row) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in change.items())
