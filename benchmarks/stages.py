# SPDX-License-Identifier: Apache-2.0
"""The table of suite ``zero3``: methods with sharded weights, and the same on ZeRO-2."""

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from benchmarks.places import header, line

Row = dict[str, Any]
BASE = ("full", 3)
LABELS = {
    "full": "full fine-tuning (stock DeepSpeed)",
    "grass": "**grass**, 2 layers + final norm (default)",
    "uniform": "uniform (LISA's draw), 2 layers + final norm",
    "badam": "cyclic in BAdam's way (ours), 1 layer + final norm",
    "badam-package": "BAdam (its own package), 1 layer",
    "full-sampler": "our wrapper doing all that stock does (sampler `full`)",
}


def zero3_table(rows: list[Row]) -> list[str]:
    """One line per method and stage: time against :data:`BASE` of the same round, where it goes, memory of the process."""
    lines = header(
        "method",
        "ZeRO stage",
        "s / step: median (least to most), mean",
        "of stock ZeRO-3: median step",
        "of stock ZeRO-3: all steps",
        "forward, backward, `step()`: medians",
        "peak memory per rank",
        "weights trained per step",
        "lowest layer trained: mean",
    )
    base = [row for row in rows if (row["method"], row["stage"]) == BASE]
    for method, stage in Counter((row["method"], row["stage"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["stage"]) == (method, stage)]
        seconds = [value for row in mine for value in row["seconds"]]
        parts = (statistics.median(row[f"median_{part}"] for row in mine) for part in ("forward", "backward", "step"))
        cells = [
            LABELS[method],
            str(stage),
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}), {statistics.mean(seconds):.2f}",
            _ratio(mine, base, statistics.median),
            _ratio(mine, base, statistics.mean),
            ", ".join(f"{value:.2f}" for value in parts),
            f"{statistics.median(row['peak_bytes'] for row in mine) / 1e9:.2f} GB",
            f"{mine[0]['trainable'] / 1e6:.1f} M",
            _lowest(mine),
        ]
        lines.append(line(cells))
    return lines


def zero3_note(rows: list[Row]) -> str:
    one = rows[0]
    period = one["grass"]["sample_period"]
    return (
        f"{one['steps']} measured steps after the same warm-up in each of {len({row['seed'] for row in rows})} interleaved rounds; probing "
        f"apart. Layers are drawn every {period} steps (default 25; BAdam's 50), so that `all steps` holds switches. Backward ends at the "
        "lowest layer drawn, and each method draws its own: compare them with the last column in mind. Ratios are taken within a round: their mean, with the least and the largest. "
        f"Stage 3 is as DeepSpeed sets it by default, but for `reduce_bucket_size`.{_peer_note(rows)}"
    )


def _ratio(mine: list[Row], base: list[Row], measure: Callable[[list[float]], float]) -> str:
    """Seconds over those of ``base`` in the rounds that both have run."""
    bases = {row["seed"]: measure(row["seconds"]) for row in base}
    rounds = [measure(row["seconds"]) / bases[row["seed"]] for row in mine if row["seed"] in bases]
    return f"{statistics.mean(rounds):.2f} ({min(rounds):.2f} to {max(rounds):.2f})" if rounds else ""


def _lowest(rows: list[Row]) -> str:
    """Where backward ended, on average over the steps; nothing for methods without a draw."""
    lowest = [min(active) for row in rows for active in row["active"] if active is not None]
    return f"{statistics.mean(lowest):.1f}" if lowest else ""


def _peer_note(rows: list[Row]) -> str:
    """What BAdam's package did with the steps that were measured."""
    mine = [row for row in rows if row["method"] == "badam-package"]
    if not mine:
        return ""
    changed = [value for row in mine for value in row["changed"]]
    return (
        f" badam {mine[0]['versions']['badam']}, blocks in random order: {changed.count(False)} of its {len(changed)} measured steps changed "
        "no weight. It switches blocks inside its optimizer's step, before ZeRO-3 copies that step's result into the weights, so the last "
        "step on every block is lost."
    )
