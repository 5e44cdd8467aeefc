# SPDX-License-Identifier: Apache-2.0
"""Places of the optimizer state that are compared, and the tables of what each costs (suites ``offload`` and ``gpu``)."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.methods import METHODS
from benchmarks.precision import BYTES, STATE

Row = dict[str, Any]
BASE = "none"
# Peak device memory that the GRASS paper (arXiv 2604.07808) reports, GB: model -> method.
PAPER = {
    "tinyllama-random": {"grass": 4.49, "lisa": 4.93, "lora": 4.71, "full": 8.76},
    "gemma-2b-random": {"grass": 12.45, "lisa": 13.33, "lora": 11.26, "full": 21.19},
    "llama2-7b-random": {"grass": 19.08, "lisa": 22.31, "lora": 19.97, "full": 51.32},
}
PAPER_NOTE = (
    "In the paper: peak memory that GRASS (arXiv 2604.07808) reports for one GPU and LoRA of rank 128, under its own conditions. Its full "
    "fine-tuning takes about 8 bytes per weight, as much as weights, gradients and both moments in bf16; ours keeps fp32 weights and moments, "
)

# No transfer before the step that needs it, and one chunk at a time.
_SERIAL = {"prefetch": "step", "device_buffers": 1}
# A chunk is otherwise a whole shard of SmolLM2-135M, and a few buffers hold all that trains.
_SMALL = {"chunk_numel": 262_144}
# variant -> its "offload" block; "nvme" is given its path by whoever runs it.
OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {"device": "none"},
    "cpu-stream": {"device": "cpu", "residency": "stream"},
    "cpu-stream-serial": {"device": "cpu", "residency": "stream", **_SERIAL},
    "cpu-stream-chunks": {"device": "cpu", "residency": "stream", **_SMALL},
    "cpu-period": {"device": "cpu", "residency": "period"},
    "cpu-period-serial": {"device": "cpu", "residency": "period", **_SERIAL},
    "nvme-stream": {"device": "nvme", "residency": "stream"},
    "nvme-stream-serial": {"device": "nvme", "residency": "stream", "host_buffers": 3, **_SERIAL},
    "nvme-stream-files": {"device": "nvme", "residency": "stream", "host_buffers": 4, **_SMALL},
    "nvme-stream-files-serial": {"device": "nvme", "residency": "stream", "host_buffers": 3, **_SMALL, **_SERIAL},
    "nvme-period": {"device": "nvme", "residency": "period"},
    "nvme-period-serial": {"device": "nvme", "residency": "period", "host_buffers": 3, **_SERIAL},
}
LABELS = {
    "none": "none: on the device",
    "cpu-stream": "cpu, stream (default)",
    "cpu-stream-serial": "cpu, stream",
    "cpu-stream-chunks": "cpu, stream, small chunks",
    "cpu-period": "cpu, period",
    "cpu-period-serial": "cpu, period",
    "nvme-stream": "nvme, stream",
    "nvme-stream-serial": "nvme, stream",
    "nvme-stream-files": "nvme, stream, small chunks through 4 host buffers",
    "nvme-stream-files-serial": "nvme, stream, small chunks through 3 host buffers",
    "nvme-period": "nvme, period",
    "nvme-period-serial": "nvme, period",
}


def step_ratios(mine: Iterable[Row], base: Iterable[Row]) -> list[list[float]]:
    """Seconds of every measured step over those of the same step of ``base``, per seed.

    What a step costs depends on the layers drawn, so only steps that train the same ones are compared.

    Raises:
        ValueError: ``base`` lacks a seed, or trained other layers.
    """
    bases = {row["seed"]: row for row in base}
    ratios = []
    for row in sorted(mine, key=lambda row: row["seed"]):
        other = bases.get(row["seed"])
        if other is None or other["active"] != row["active"]:
            raise ValueError(
                f"{row['offload']} and {BASE} did not train the same layers with seed {row['seed']}: no ratio"
            )
        ratios.append([a / b for a, b in zip(row["seconds"], other["seconds"], strict=True)])
    return ratios


def line(cells: Sequence[str]) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def header(*names: str) -> list[str]:
    """The lines that a table begins with."""
    return [line(names), f"|{'---|' * len(names)}"]


def each(rows: Iterable[Row], key: str, separator: str = " / ") -> str:
    """Every value that the rows have, once."""
    return separator.join(str(value) for value in sorted({row[key] for row in rows}))


def threads(rows: Iterable[Row]) -> str:
    """How many threads a process of the rows had: ``1 thread``."""
    count = each(rows, "threads")
    return f"{count} thread{'' if count == '1' else 's'}"


def precision_unlike_bf16(row: Row) -> str:
    """What sentences of README.md, which are of bf16 unless they say otherwise, say of a row's precision: ``, fp32``."""
    return "" if row["dtype"] == "bf16" else f", {row['dtype']}"


def offload_table(rows: list[Row]) -> list[str]:
    """One line per variant: time against :data:`BASE`, memory of the process, bytes of state by place."""
    lines = header(
        "state",
        "overlap",
        "s / step: median, mean",
        "of none: median step",
        "of none: all steps",
        "in `step()`: median",
        "more than none in `step()`: mean",
        "RSS (peak)",
        "state on device, host, files",
        "read, written per step",
    )
    for offload in OFFLOADS:
        mine = [row for row in rows if row["offload"] == offload]
        if not mine:
            continue
        seconds = [value for row in mine for value in row["seconds"]]
        cells = [
            LABELS[offload],
            _overlap(offload),
            f"{statistics.median(seconds):.3f}, {statistics.mean(seconds):.3f}",
            *_of_base(mine, rows),
            f"{1e3 * statistics.median(value for row in mine for value in row['step_seconds']):.0f} ms",
            _added(mine, rows),
            f"{_median(mine, 'resident_bytes') / 1e9:.2f} ({_median(mine, 'peak_bytes') / 1e9:.2f}) GB",
            _state(mine[0], ("device", "host", "nvme")),
            _disk(mine),
        ]
        lines.append(line(cells))
    return lines


def offload_note(rows: list[Row]) -> str:
    one = rows[0]
    period = one["grass"]["sample_period"]
    return (
        f"{one['steps']} measured steps in each of {len({row['seed'] for row in rows})} interleaved rounds. 2 of 30 layers, drawn by the "
        f"`uniform` sampler every {period} steps (default 25): no probing, and the same layers in all variants of a round. The state of "
        f"all layers was made before the first step, as it is after a long run: every draw moves state ({_first_steps(rows)}). Ratios "
        "compare each step with the same step of `none`: the median step with the spread of the rounds' medians, and the sum of all steps, "
        "which holds the draws. Without overlap: `prefetch: step`, `device_buffers: 1`, and for nvme `host_buffers: 3`. Small chunks: 262144 elements "
        "instead of a whole shard of a layer; through so few host buffers every step reads and writes files. Bytes are per rank."
    )


def gpu_table(rows: list[Row]) -> list[str]:
    """One line per batch, method, stage and place of the state; a cell that did not fit says so."""
    lines = header(
        "method",
        "ZeRO stage, GPUs",
        "batch",
        "state",
        "s / step: median, mean",
        "of none: median step",
        "of none: all steps",
        "tokens/s",
        "peak device memory",
        "in the paper",
        "state on device, host",
    )
    for kind in Counter(_gpu_setting(row) for row in rows):
        method, stage, ranks, batch, offload = kind
        found = [row for row in rows if _gpu_setting(row) == kind]
        mine = [row for row in found if "skipped" not in row]
        label = [METHODS[method].label, f"{stage}, {ranks}", str(batch), offload or "as by default"]
        if not mine:
            lines.append(line([*label, f"skipped: {found[0]['skipped']}", *[""] * 4, _paper(found[0]), ""]))
            continue
        seconds = [value for row in mine for value in row["seconds"]]
        tokens = ranks * batch * mine[0]["accumulation"] * mine[0]["sequence"]
        same = [row for row in rows if _gpu_setting(row)[:4] == kind[:4]]
        cells = [
            *label,
            f"{statistics.median(seconds):.3f}, {statistics.mean(seconds):.3f}",
            *(_of_base(mine, same) if offload else ("", "")),
            f"{tokens / statistics.mean(seconds):.0f}",
            f"{max(row['peak_bytes'] for row in mine) / 1e9:.2f} GB",
            _paper(mine[0]),
            _state(mine[0], ("device", "host")) if mine[0]["bytes"] else "",
        ]
        lines.append(line(cells))
    return lines


def gpu_note(rows: list[Row]) -> str:
    one, probing = rows[0], sorted({row["temperature"] for row in rows if row["temperature"] is not None})
    return (
        f"Random weights, gradient checkpointing (non-reentrant), fused AdamW, {one['steps']} measured steps, a draw of 2 layers every "
        f"{one['grass']['sample_period']}. Peak: of the device's allocator, from the start of the process. State: of `grass` and its like at most, of others between steps. "
        f"`grass` probed before (temperature {', '.join(f'{value:g}' for value in probing) or 'not measured'}); `uniform` draws the same "
        "layers in all its rows, which the ratios compare step by step; `cpu-stream-serial` is without overlap. The state of all layers was made before "
        f"the first step, but for `none`, where it would not fit ({_first_steps([row for row in rows if row['offload']])}). {PAPER_NOTE}"
        f"{2 * BYTES[one['dtype']] + STATE} bytes per weight."
    )


def _gpu_setting(row: Row) -> tuple[str, int, int, int, str | None]:
    return row["method"], row["stage"], row["ranks"], row["micro_batch"], row["offload"]


def _paper(row: Row) -> str:
    """The paper's figure beside ours, on one device with the state where the method has it by default."""
    peak = PAPER.get(row["model"], {}).get(row["method"])
    return f"{peak:.2f} GB" if peak is not None and row["ranks"] == 1 and row["offload"] is None else ""


def _of_base(mine: list[Row], rows: list[Row]) -> tuple[str, str]:
    """Ratio of the median step, with the least and the largest of the rounds; ratio of the sums."""
    base = [row for row in rows if row["offload"] == BASE and "skipped" not in row]
    if not base:
        return "", ""
    rounds = step_ratios(mine, base)
    medians = [statistics.median(ratios) for ratios in rounds]
    every = statistics.median(ratio for ratios in rounds for ratio in ratios)
    seeds = {row["seed"] for row in mine}
    whole = sum(sum(row["seconds"]) for row in mine) / sum(sum(row["seconds"]) for row in base if row["seed"] in seeds)
    return f"{every:.3f} ({min(medians):.3f} to {max(medians):.3f})", f"{whole:.3f}"


def _added(mine: list[Row], rows: list[Row]) -> str:
    found = added(mine, rows)
    return "" if found is None else f"{1e3 * found[0]:+.0f} ms = {found[1]:+.1%}"


def added(mine: list[Row], rows: list[Row]) -> tuple[float, float] | None:
    """Mean seconds in ``step()`` beyond those of the same steps of :data:`BASE`, draws included; and their share of a whole step there."""
    bases = {row["seed"]: row for row in rows if row["offload"] == BASE}
    pairs = [(row, bases[row["seed"]]) for row in mine if row["offload"] != BASE and row["seed"] in bases]
    if not pairs:
        return None
    seconds = statistics.mean(
        statistics.mean(row["step_seconds"]) - statistics.mean(base["step_seconds"]) for row, base in pairs
    )
    return seconds, seconds / statistics.mean(statistics.mean(base["seconds"]) for _, base in pairs)


def offload_sentence(rows: list[Row]) -> str:
    """What README.md quotes; empty where a variant has not been measured."""
    found = {offload: [row for row in rows if row["offload"] == offload] for offload in OFFLOADS}
    if not all(found.values()):
        return ""
    cost = {offload: measured for offload, mine in found.items() if (measured := added(mine, rows)) is not None}
    if len(cost) != len(OFFLOADS) - 1:  # all but the base
        return ""
    one = rows[0]
    saved = _median(found[BASE], "resident_bytes") - _median(found["nvme-stream"], "resident_bytes")
    return (
        f"Measured (SmolLM2-135M{precision_unlike_bf16(one)}, {one['ranks']} {one['device'].upper()} ranks, all layers' state made before, a draw every "
        f"{one['grass']['sample_period']} steps, commit {each(rows, 'commit', ', ')}): `cpu`, `stream` adds "
        f"{1e3 * cost['cpu-stream'][0]:.0f} ms to `step()`, {cost['cpu-stream'][1]:.1%} of a step over `none`; `nvme`, `stream` "
        f"{cost['nvme-stream'][1]:.1%} ({cost['nvme-stream-serial'][1]:.1%} without overlap) with {saved / 1e9:.2f} GB less resident memory per "
        f"rank, and {cost['nvme-stream-files'][1]:.1%} if every step has to go through files."
    )


def _overlap(offload: str) -> str:
    return "" if offload == BASE else "no" if offload.endswith("-serial") else "yes"


def _median(rows: list[Row], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def _state(row: Row, places: tuple[str, ...]) -> str:
    """Bytes of optimizer state by place; the device's are its peak."""
    return ", ".join(f"{row['bytes']['optimizer_state'].get(place, 0) / 1e6:.1f}" for place in places) + " MB"


def _disk(rows: list[Row]) -> str:
    steps = sum(row["steps"] for row in rows)
    return (
        ", ".join(f"{sum(row['disk_bytes'][d] for row in rows) / steps / 1e6:.1f}" for d in ("read", "written"))
        + " MB"
    )


def _first_steps(rows: list[Row]) -> str:
    """How much of what was measured made state instead of moving it."""
    made = {row["offload"]: row["first_steps"] for row in rows if row.get("first_steps")}
    listed = ", ".join(f"{count} times with {offload}" for offload, count in made.items())
    return f"state made while measuring: {listed or 'never'}"
