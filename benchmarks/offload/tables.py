# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``offload``: time against state on the device, memory, and bytes through the disk."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.offload.variants import BASE, OFFLOADS
from benchmarks.report.table import conditions, each, median, table

Row = dict[str, Any]


def tables(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    periods = sorted({row["grass"]["sample_period"] for row in rows})
    made = sum(row["first_steps"] for row in rows)
    text = (
        f"{each(rows, 'steps')} steps in each of {len({row['seed'] for row in rows})} interleaved rounds, "
        f"a draw every {', '.join(map(str, periods))}; states allocated while measuring: {made}"
    )
    found = [[row for row in rows if row["offload"] == offload] for offload in OFFLOADS]
    groups = [mine for mine in found if mine]
    names = {"`offload`": lambda mine: mine[0]["offload"]}
    seconds = {
        **names,
        "median s / step": lambda mine: median(every(mine, "seconds"), 3),
        "mean": lambda mine: f"{statistics.fmean(every(mine, 'seconds')):.3f}",
        "median, of none": lambda mine: median_of_base(mine, rows),
        "all steps, of none": lambda mine: sum_of_base(mine, rows),
    }
    optimizer = {
        **names,
        "median ms": lambda mine: median(every(mine, "step_seconds"), 0, 1e3),
        "mean, above none": lambda mine: "" if (more := added(mine, rows)) is None else f"{1e3 * more[0]:+.0f} ms",
        "of a step": lambda mine: "" if (more := added(mine, rows)) is None else f"{more[1]:+.1%}",
    }
    memory = {
        **names,
        "RSS, GB": lambda mine: median([row["resident_bytes"] for row in mine], 2, 1e-9),
        "peak RSS, GB": lambda mine: median([row["peak_bytes"] for row in mine], 2, 1e-9),
        **{
            f"state on {device}, MB": lambda mine, device=device: state_bytes(mine[0], device)
            for device in ("device", "host", "nvme")
        },
    }
    disk = {
        **names,
        **{
            f"{direction} per step, MB": lambda mine, direction=direction: (
                f"{sum(row['disk_bytes'][direction] for row in mine) / sum(row['steps'] for row in mine) / 1e6:.1f}"
            )
            for direction in ("read", "written")
        },
    }
    return [
        "## Offload of optimizer state",
        conditions(rows, text),
        table("Offload: time per step", groups, seconds),
        table("Offload: time in `step()`", groups, optimizer),
        table("Offload: memory of a rank", groups, memory),
        table("Offload: disk traffic of a rank", groups, disk),
    ]


def every(rows: Iterable[Row], name: str) -> list[float]:
    """The values of all steps."""
    return [value for row in rows for value in row[name]]


def state_bytes(row: Row, device: str) -> str:
    """MB of optimizer state; the peak of what is on the device."""
    return f"{row['bytes']['optimizer_state'].get(device, 0) / 1e6:.1f}"


def step_ratios(mine: Iterable[Row], base: Iterable[Row]) -> list[list[float]]:
    """Seconds of every measured step over those of the same step of ``base``, per seed.

    A step costs what its layers cost, so only steps that train the same layers are compared.

    Raises:
        ValueError: ``base`` lacks a seed, or trained other layers.
    """
    bases = {row["seed"]: row for row in base}
    ratios = []
    for row in sorted(mine, key=lambda row: row["seed"]):
        other = bases.get(row["seed"])
        if other is None or other["active"] != row["active"]:
            raise ValueError(f"{row['offload']} and {BASE} trained different layers with seed {row['seed']}: no ratio")
        ratios.append([a / b for a, b in zip(row["seconds"], other["seconds"], strict=True)])
    return ratios


def median_of_base(mine: list[Row], rows: Sequence[Row]) -> str:
    """Ratio of the median step, with the least and the largest median of a round."""
    if not (base := _base(rows)):
        return ""
    rounds = step_ratios(mine, base)
    medians = [statistics.median(ratios) for ratios in rounds]
    every_step = statistics.median(ratio for ratios in rounds for ratio in ratios)
    return f"{every_step:.3f} ({min(medians):.3f} to {max(medians):.3f})"


def sum_of_base(mine: list[Row], rows: Sequence[Row]) -> str:
    """Ratio of the sums of all steps, draws included."""
    seeds = {row["seed"] for row in mine}
    base = [row for row in _base(rows) if row["seed"] in seeds]
    return f"{sum(every(mine, 'seconds')) / sum(every(base, 'seconds')):.3f}" if base else ""


def added(mine: list[Row], rows: Sequence[Row]) -> tuple[float, float] | None:
    """Mean seconds in ``step()`` beyond the same steps of the base, and their share of a whole step there."""
    bases = {row["seed"]: row for row in _base(rows)}
    pairs = [(row, bases[row["seed"]]) for row in mine if row["offload"] != BASE and row["seed"] in bases]
    if not pairs:
        return None
    mean = statistics.mean
    seconds = mean(mean(row["step_seconds"]) - mean(base["step_seconds"]) for row, base in pairs)
    return seconds, seconds / mean(mean(base["seconds"]) for _, base in pairs)


def _base(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["offload"] == BASE and "skipped" not in row]
