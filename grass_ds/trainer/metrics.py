# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run, read from `engine.grass`; a hand-written loop may log them as well."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

PHASES = {"probe": 0.0, "train": 1.0}


def grass_metrics(handle: Any) -> dict[str, float]:
    """Describe `engine.grass` as flat scalars, for any logger. No communication; the same keys on every rank.

    After `engine.step()` the values describe the layers that the NEXT step trains. `<layer>` is the layer's index,
    zero-padded so that dashboards which sort by name keep the layers in order.

    | key | value |
    |---|---|
    | `grass/phase` | 0 while probing, 1 while training |
    | `grass/active/<layer>` | 1 if the layer is in the active set A_t, else 0 (1 for every layer while probing) |
    | `grass/score/<layer>` | importance m_l (mean gradient norm), or D_l in %; absent while there is none |
    | `grass/prob/<layer>` | p_l of the next draw |
    | `grass/visits/<layer>` | optimizer steps in which the layer was trained |
    | `grass/bytes/<category>/<memory>` | bytes of this rank; weights, gradients, optimizer_state; device, host, nvme |
    | `grass/checkpoint/stall_seconds` | pause of training for the last checkpoint; absent before the first |
    | `grass/checkpoint/bytes` | bytes of it that this rank has written so far |
    """
    columns: dict[str, Sequence[float]] = {
        "active": [layer in handle.active_layers for layer in range(len(handle.layers))],
        "score": handle.scores or (),
        "prob": handle.probabilities,
        "visits": handle.visits,
    }
    width = max(2, len(str(len(handle.layers) - 1)))
    metrics = {"grass/phase": PHASES[handle.phase]}
    for name, values in columns.items():
        metrics.update({f"grass/{name}/{i:0{width}d}": float(value) for i, value in enumerate(values)})
    for category, sizes in handle.memory().items():
        metrics.update({f"grass/bytes/{category}/{memory}": float(size) for memory, size in sizes.items()})
    if handle.checkpoint is not None:
        metrics["grass/checkpoint/stall_seconds"] = handle.checkpoint.stall_seconds
        metrics["grass/checkpoint/bytes"] = float(handle.checkpoint.bytes)
    return metrics


def grass_summary(handle: Any) -> dict[str, float | str]:
    """The values for a log line, whose number does not grow with the model. They describe the NEXT step, too.

    `grass/phase` and `grass/checkpoint/stall_seconds` are those of `grass_metrics`. `grass/active_layers` has the
    indices of the active set A_t as text ("3 17", or "all"), `grass/bytes/<memory>` the sum over categories.
    """
    everything = len(handle.active_layers) == len(handle.layers)
    summary: dict[str, float | str] = {
        "grass/phase": PHASES[handle.phase],
        "grass/active_layers": "all" if everything else " ".join(map(str, sorted(handle.active_layers))),
    }
    totals: Counter[str] = Counter()
    for sizes in handle.memory().values():
        totals.update(sizes)
    summary.update({f"grass/bytes/{memory}": float(size) for memory, size in totals.items()})
    if handle.checkpoint is not None:
        summary["grass/checkpoint/stall_seconds"] = handle.checkpoint.stall_seconds
    return summary
