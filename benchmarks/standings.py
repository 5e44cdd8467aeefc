# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``quality``: the learning rates tried, what every method reached, and differences within a seed."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.contest import (
    CHANGES,
    DRAWN,
    FEWER,
    METHODS,
    RATES,
    SETTINGS,
    STEPS,
    TUNING_SEED,
    best_rates,
    tried_rates,
)
from benchmarks.draws import alike, distance
from benchmarks.methods import METHODS as KNOWN
from benchmarks.places import each, header, line, threads
from benchmarks.spending import compares, mean_of_all, spending_table, step_flops, untrained_loss
from benchmarks.staleness import staleness_note, staleness_table
from benchmarks.tasks import ROWS, TASKS
from benchmarks.worth import worth_note, worth_table

Row = dict[str, Any]
SPENDING_NOTE = (
    "Each method's curve where it has spent what the most frugal run of all spends in the whole of its steps, linear between the points "
    "measured; means over the seeds. Learning rates fall to zero with the last step, so a dear method is shown in mid-run here: a shorter "
    "run of it, with its own schedule, would have a lower loss."
)
MODEL = "SmolLM2-135M-Instruct, from weights of 4 bits (Q4_1)"
# Student's t, 97.5 %, by number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
CHANGES_NOTE = (
    "Within a seed, so on the same rows, with the learning rate of `grass` as it is, whose loss is the mean of its draws on that seed: its run "
    "above, and those with another seed of the sampler where there are any. The first line then is chance alone: how far each draw is from "
    "that mean. From uniform: total variation between the draw's distribution and the uniform one. Alike: share of the layers trained in a "
    f"step that the run above trained, too, in that step. `cost_weight` (a preference for layers whose step is cheap) and `exploration` (a share "
    f"of the draw that is uniform) were options once; `steps` {FEWER} is the plain way to the arithmetic of `cost_weight` 8: fewer steps, with a "
    "schedule of their own."
)
PAIRS_NOTE = (
    "Both methods saw the same rows with a seed, and their samplers the same random numbers. Alike: share of the layers trained in a step "
    "that both have trained in that step."
)
REDRAWN_NOTE = (
    "Further runs with other seeds of the sampler: same rows in the same order, same learning rate, other layers at other times. Differences "
    "are between runs with the same rows and the same seed of the sampler; the interval is of further draws on these rows. Development loss."
)
LONG_NOTE = (
    "With the learning rates that were best in short runs, and the sampler's periods of those: they tell whether the order of the methods "
    "changes with the length."
)
PAIRS = (
    ("grass", "uniform"),
    ("grass-sharp", "uniform"),
    ("grass", "full"),
    ("grass", "lora"),
    ("grass", "static"),
    ("grass-embed", "grass"),
)


def sections(rows: Sequence[Row]) -> list[str]:
    """Lines of all sections, one per task; nothing for tasks without rows."""
    lines = []
    for task in TASKS:
        mine = [row for row in rows if row["task"] == task]
        if mine:
            lines += _section(task, mine)
    return lines


def _section(task: str, rows: Sequence[Row]) -> list[str]:
    lines = [f"## Quality: task `{task}`", "", _conditions(task, rows), ""]
    if tuning := [row for row in rows if row["seed"] == TUNING_SEED]:
        lines += ["### Learning rates tried: loss on development rows", "", *_tuning_table(task, tuning), ""]
    if reached := reported(rows):
        lines += ["### What was reached", "", *_standings_table(reached), ""]
        lines += ["### Differences within a seed", "", PAIRS_NOTE, "", *_pairs_table(reached), ""]
    if redrawn := other_draws(rows):
        lines += ["### Other draws: how much is chance?", "", REDRAWN_NOTE, "", *_redrawn_table(redrawn), ""]
    if short := [row for row in rows if row.get("curve") and row["steps"] == STEPS]:
        lines += ["### Loss for the same spending", "", SPENDING_NOTE, ""]
        lines += [*spending_table(short, untrained_loss(rows, task)), ""]
        lines += [f"![loss](plots/loss-{task}.png)", "", f"![layers trained](plots/layers-{task}.png)", ""]
    if longer := [row for row in rows if row["steps"] > STEPS]:
        lines += [
            "### Longer runs",
            "",
            f"{LONG_NOTE}{_longer_difference(longer)}",
            "",
            *_longer_table(longer, reached),
            "",
        ]
    if changed := [row for row in rows if row["method"] == "grass" and 0 < row["steps"] <= STEPS and _changed(row)]:
        lines += ["### grass with one setting changed", "", CHANGES_NOTE, ""]
        lines += [*_changes_table(changed, trained(reached, "grass")), ""]
    if measured := [row for row in rows if row.get("reprobes")]:
        lines += ["### Do scores go stale?", "", staleness_note(measured), "", *staleness_table(measured), ""]
    if valued := [row for row in rows if "worth" in row]:
        lines += ["### Are layers with large gradients the ones worth training?", "", worth_note(valued), ""]
        lines += [*worth_table(valued), "", f"![worth](plots/worth-{task}.png)", ""]
    return lines


def _conditions(task: str, rows: Sequence[Row]) -> str:
    one = next((row for row in rows if row["steps"] == STEPS), rows[0])
    what = TASKS[task]
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    reached = [row for row in reported(rows) if row["steps"]]
    elsewhere = ", left out of methods that ran on another day than grass, when the machine was not as fast"
    if all(compares("cpu_seconds", [row], reached) for row in reached):
        elsewhere = ""
    answers = "exact match of generated numbers" if what.exact else "the most likely option"
    return (
        f"{one['model']} ({MODEL}, trained in {one['dtype']}), {one['steps']} steps of {one['micro_batch']} rows (at most {one['sequence']} tokens each) from "
        f"{_sources(task, rows)}; every method sees the same rows in the same order, and probing counts as steps. {one['dtype']}, AdamW (fused), clip "
        f"1.0, linear warm-up over 5 steps, then down to zero. The sampler's periods are a fifth of its defaults: {_settings(one)}; the rest "
        f"as by default. Loss: mean cross-entropy per answer token on {one['dev_rows']} development rows (they choose the learning rate, on "
        f"a seed of its own) and on the test rows behind them; accuracy: {answers} on {what.answered(ROWS)} test rows of {', '.join(what.exact or what.choice)} each. "
        f"{len({row['seed'] for row in reached})} seeds: mean ± standard deviation. One rank on {one['device']} ({each(rows, 'hardware')}, {threads(rows)}); {_cells_at_a_time(rows)}, "
        f"so time is CPU time of the steps{elsewhere}. {versions}; training rows {one['data']}; commit {each(rows, 'commit', ', ')}"
    )


def _cells_at_a_time(rows: Sequence[Row]) -> str:
    count = {"1": "one", "2": "two"}.get(jobs := each(rows, "jobs"), jobs)
    return f"{count} cell{'' if jobs == '1' else 's'} at a time"


def _sources(task: str, rows: Sequence[Row]) -> str:
    """With the share of each, where rows tell it."""
    counts = next((row["train_rows"] for row in rows if "train_rows" in row), {})
    shares = {source: f" ({count / sum(counts.values()):.0%} of the rows)" for source, count in counts.items()}
    return ", ".join(source + (shares[source] if len(shares) > 1 else "") for source in TASKS[task].train)


def _settings(row: Row) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in row["grass"].items())


def _tuning_table(task: str, rows: Sequence[Row]) -> list[str]:
    """Development loss per method and learning rate; the least is bold once no other is to be tried."""
    lines = header("method", *(f"{lr:g}" for lr in RATES))
    best, tried = best_rates(task, rows), tried_rates(task, rows)
    for method in METHODS:
        if method in tried:
            shown = {lr: f"{loss:.3f}" for lr, loss in tried[method].items()}
            if method in best:
                shown[best[method]] = f"**{shown[best[method]]}**"
            lines.append(line([method, *(shown.get(lr, "") for lr in RATES)]))
    return lines


def _standings_table(rows: Sequence[Row]) -> list[str]:
    sources = list(rows[0]["accuracy"])
    lines = header(
        "method",
        "lr",
        "test loss",
        "development loss",
        "accuracy: mean",
        *(f"accuracy: {source}" for source in sources),
        "CPU seconds per step",
        "resident memory at most (Adam state of the layers drawn so far included)",
        "weights trained per step",
        "draw, from uniform",
        "seeds",
    )
    for untrained in [row for row in rows if row["steps"] == 0][:1]:
        scores = [f"{untrained['accuracy'][source]:.3f}" for source in sources]
        losses = [f"{untrained[name]:.3f}" for name in ("test_loss", "dev_loss")]
        mean = f"{statistics.mean(untrained['accuracy'].values()):.3f}"
        lines.append(line(["(untrained)", "", *losses, mean, *scores, *[""] * 4, "1"]))
    if constant := next((row["constant"] for row in rows if row.get("constant")), None):
        shares = [f"{constant[source]:.3f}" for source in sources]
        mean = f"{statistics.mean(constant.values()):.3f}"
        lines.append(line(["(most frequent answer)", *[""] * 3, mean, *shares, *[""] * 5]))
    for method in METHODS:
        mine = trained(rows, method)
        if not mine:
            continue
        cells = [
            KNOWN[method].bare_label,
            f"{mine[0]['lr']:g}",
            *(spread([row[name] for row in mine]) for name in ("test_loss", "dev_loss")),
            spread([mean_accuracy(row) for row in mine]),
            *(spread([row["accuracy"][source] for row in mine]) for source in sources),
            f"{statistics.mean(row['cpu_seconds'] / row['steps'] for row in mine):.2f}"
            if compares("cpu_seconds", mine, rows)
            else "",
            f"{statistics.median(row['peak_bytes'] for row in mine) / 1e9:.2f} GB",
            f"{mine[0]['trainable'] / 1e6:.1f} M",
            mean_of_all([distance(row) for row in mine], 2),
            str(len(mine)),
        ]
        lines.append(line(cells))
    return lines


def _pairs_table(rows: Sequence[Row]) -> list[str]:
    lines = header(
        "difference",
        "test loss, negative is better",
        "95 % interval of its mean",
        "accuracy, positive is better",
        "alike",
        "seeds",
    )
    measures: tuple[Callable[[Row], float], ...] = (lambda row: row["test_loss"], mean_accuracy)
    for left, right in PAIRS:
        found = [within_seeds(rows, left, right, measure) for measure in measures]
        if found[0]:
            loss, accuracy = map(differences, found)
            common = mean_of_all([alike(*pair) for pair in _pairs(rows, left, right)], 2)
            lines.append(line([f"{left} - {right}", loss, interval(found[0]), accuracy, common, str(len(found[0]))]))
    return lines


def _pairs(rows: Sequence[Row], left: str, right: str) -> list[tuple[Row, Row]]:
    """Rows of both methods, for every seed that both have."""
    ours, others = ({row["seed"]: row for row in trained(rows, method)} for method in (left, right))
    return [(ours[seed], others[seed]) for seed in sorted(set(ours) & set(others))]


def within_seeds(rows: Sequence[Row], left: str, right: str, measure: Callable[[Row], float]) -> list[float]:
    """How much more one method has than the other, for every seed that both have."""
    return [measure(ours) - measure(theirs) for ours, theirs in _pairs(rows, left, right)]


def _redrawn_table(rows: Sequence[Row]) -> list[str]:
    """A line per method with the losses of all its draws, and one with the differences between the two."""
    seeds = sorted({row["seed"] for row in rows})
    pairs = redrawn_differences(rows)
    lines = header("", *(f"rows of seed {seed}" for seed in seeds), "all", "95 % interval of the mean", "runs")
    for label, found, show in (
        *((method, _drawn_losses(rows, method), spread) for method in DRAWN),
        (f"{DRAWN[1]} - {DRAWN[0]}", pairs, differences),
    ):
        by_seed = [[value for (seed, _), value in sorted(found.items()) if seed == one] for one in seeds]
        shown = [show(values) if values else "" for values in (*by_seed, list(found.values()))]
        lines.append(line([label, *shown, interval(list(pairs.values())) if found is pairs else "", str(len(found))]))
    return lines


def other_draws(rows: Sequence[Row]) -> list[Row]:
    """Runs with a seed of the sampler's own, of either method."""
    return [row for row in rows if "seed" in row["grass"]]


def redrawn_differences(rows: Sequence[Row]) -> dict[tuple[int, int], float]:
    """Development loss of the second of :data:`DRAWN` minus that of the first, by seed of the rows and seed of the sampler."""
    theirs, ours = (_drawn_losses(rows, method) for method in DRAWN)
    return {drawn: ours[drawn] - theirs[drawn] for drawn in sorted(ours.keys() & theirs.keys())}


def _drawn_losses(rows: Sequence[Row], method: str) -> dict[tuple[int, int], float]:
    return {(row["seed"], row["grass"]["seed"]): row["dev_loss"] for row in trained(rows, method)}


def _longer_table(rows: Sequence[Row], reached: Sequence[Row]) -> list[str]:
    """Development losses along a longer run, and that of the short run with the same seed."""
    (points,) = {tuple(point["step"] for point in row["curve"]) for row in rows}
    lines = header(
        "method",
        "lr",
        *(f"development loss after {step} of {rows[0]['steps']} steps" for step in points),
        f"in a run of {STEPS}",
        "TFLOP of the steps",
        "seed",
    )
    for row in sorted(rows, key=lambda row: METHODS.index(row["method"])):
        short = [one["dev_loss"] for one in trained(reached, row["method"]) if one["seed"] == row["seed"]]
        cells = [
            KNOWN[row["method"]].bare_label,
            f"{row['lr']:g}",
            *(f"{point['dev_loss']:.3f}" for point in row["curve"]),
            *([f"{loss:.3f}" for loss in short] or [""]),
            f"{sum(step_flops(row)) / 1e12:.0f}",
            str(row["seed"]),
        ]
        lines.append(line(cells))
    return lines


def _longer_difference(rows: Sequence[Row]) -> str:
    """Of the last development losses, within a seed; empty if there is no pair."""
    ours, theirs = reversed(DRAWN)
    found = within_seeds(rows, ours, theirs, lambda row: row["dev_loss"])
    return f" At their end {ours} - {theirs}, within a seed: {differences(found)}." if found else ""


def _changes_table(rows: Sequence[Row], base: Sequence[Row]) -> list[str]:
    """Development loss against ``grass`` as it is, within a seed; and what the steps cost."""
    lines = header(
        "changed",
        "development loss minus that of grass as it is",
        "FLOPs, of grass as it is",
        "from uniform",
        "alike",
        "runs",
    )
    # As it is, with all its draws: the luck of one would be in every line.
    bases = {seed: [row for row in base if row["seed"] == seed] for seed in {row["seed"] for row in base}}
    for row in other_draws(rows):
        bases.get(row["seed"], []).append(row)
    losses = {seed: statistics.mean(row["dev_loss"] for row in runs) for seed, runs in bases.items()}
    flops = {seed: statistics.mean(sum(step_flops(row)) for row in runs) for seed, runs in bases.items()}
    found: dict[str, list[Row]] = {label: [] for label in map(_label, CHANGES)}
    for row in rows:
        if row["seed"] in bases and "seed" not in row["grass"]:
            found.setdefault(_label(_changed(row)), []).append(row)
    if redrawn := [row for seed in sorted(bases) if len(bases[seed]) > 1 for row in bases[seed]]:
        found = {"nothing; its draws": redrawn, **found}
    for label, mine in found.items():
        if not mine:
            continue
        loss = differences([row["dev_loss"] - losses[row["seed"]] for row in mine])
        cost = sum(sum(step_flops(row)) for row in mine) / sum(flops[row["seed"]] for row in mine)
        shared = [alike(row, bases[row["seed"]][0]) for row in mine if row is not bases[row["seed"]][0]]
        seen = (mean_of_all([distance(row) for row in mine], 2), mean_of_all(shared, 2))
        lines.append(line([label, loss, f"{cost:.2f}", *seen, str(len(mine))]))
    return lines


def _changed(row: Row) -> Row:
    """What is not as in :data:`SETTINGS`, fewer steps too; settings that a later suite leaves out are still in its rows."""
    settings = {name: value for name, value in row["grass"].items() if SETTINGS.get(name) != value}
    return settings | ({"steps": row["steps"]} if row["steps"] != STEPS else {})


def _label(change: Row) -> str:
    return ", ".join(f"`{name}` {value}" for name, value in change.items())


def reported(rows: Sequence[Row]) -> list[Row]:
    """Rows with all that is measured, the untrained model's among them."""
    return [row for row in rows if "test_loss" in row]


def trained(rows: Sequence[Row], method: str) -> list[Row]:
    return sorted((row for row in rows if row["method"] == method and row["steps"]), key=lambda row: row["seed"])


def mean_accuracy(row: Row) -> float:
    return statistics.mean(row["accuracy"].values())


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def interval(values: Sequence[float]) -> str:
    """Where the mean of many such differences would lie, were they normally distributed; empty if there are too few or too many to say."""
    if len(values) not in STUDENT:
        return ""
    reach = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values) - reach:+.3f} to {statistics.mean(values) + reach:+.3f}"


def mean_and_interval(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):+.3f}" + (f" (95 % interval {found})" if (found := interval(values)) else "")


def differences(values: Sequence[float]) -> str:
    each = ", ".join(f"{value:+.3f}" for value in values)
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.3f}{deviation} ({each})"
