# SPDX-License-Identifier: Apache-2.0
"""The tables of suite ``cpu``: time, memory and traffic of a step, and each of them against its floor."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import floors
from benchmarks.case import Case
from benchmarks.lineup import Setting, compared, lines_of, ratios, spread, step_seconds
from benchmarks.methods import METHODS, NOT_RUN
from benchmarks.places import header, line
from benchmarks.precision import STATE
from grass_ds.config import GrassConfig

Row = dict[str, Any]
# Above this a ratio is to be explained.
EXPLAIN = 1.15
# (method, stage, measure of FLOORS) -> why it is above its floor; all variants of the method on this stage share it.
_ALL_REDUCE = "DeepSpeed all-reduces gradients on stages 1 and 2, where a reduce-scatter would do"
_EMBEDDINGS = (
    "waits for the embeddings' reduce-scatter and gather 0.2 s, copies, most of their Adam state from and to host memory, 0.1 s, "
    "norms of their gradient 0.1 s"
)
_HOOKS = "DeepSpeed's hooks around every module 0.4 s, of which joins of shards (`torch.cat`) 0.1 s, waits for gathers 0.1 s"
_JOINS = "waits for gathers and reduce-scatters 0.4 s, casts 0.2 s, joins of shards (`torch.cat`) 0.2 s"
_BUCKETS = (
    "in forward DeepSpeed gathers ahead, 5e7 elements at a time (`stage3_prefetch_bucket_size`), and what is gathered together is freed "
    "together: where little of backward follows, that is the peak"
)
_THREE_TIMES = "DeepSpeed holds the gradient partition three times in its step: as it is, in one piece, in fp32"
REASONS: dict[tuple[str, int, str], str] = {
    **{(method, 2, "traffic"): _ALL_REDUCE for method in ("full", "full-offload", "lora-16", "lora", "lora-fa")},
    ("lisa-toggle", 2, "traffic"): "zeros are reduced and unchanged weights gathered for layers that are not to train",
    ("lisa-toggle", 2, "memory"): "gradients and Adam state of all layers, whether they are to train or not",
    ("full", 2, "memory"): _THREE_TIMES,
    ("full-offload", 2, "memory"): "gradients of all layers wait on the device for their way to the host",
    # Seconds of a step under cProfile, where accumulation and checkpointing are as by default.
    ("full", 2, "time"): "waits for all-reduces 0.7 s, casts to fp32 0.3 s, a norm of every parameter 0.2 s",
    ("full-offload", 2, "time"): "waits for all-reduces 0.8 s, casts 0.2 s, AdamW on host memory and copies 0.1 s",
    ("lora", 2, "time"): "waits for all-reduces 0.2 s",
    ("lisa-toggle", 2, "time"): "waits for all-reduces and gathers of all layers 0.4 s, casts 0.3 s",
    ("full-sampler", 2, "time"): "waits for reduce-scatters and gathers 0.7 s, norms of gradients 0.1 s",
    **{(method, 2, "time"): _EMBEDDINGS for method in ("grass-embed", "lisa")},
    ("full", 3, "time"): _JOINS,
    ("badam-package", 3, "time"): (
        "DeepSpeed's hooks around every module 0.5 s, joins of shards (`torch.cat`) 0.1 s, profiled with a switch every 5 steps"
    ),
    **{(method, 3, "time"): _HOOKS for method in ("grass", "uniform", "cyclic")},
    **{(method, 3, "memory"): _BUCKETS for method in ("badam-package", "grass", "uniform", "cyclic")},
}
# What the reasons for time, which are seconds, were profiled on; rows of anything else have none.
PROFILED = {"hardware": "AMD EPYC, 2 cores, 24 GiB", "dtype": "bf16"}
# Optimizer steps of the run whose share of probing is told.
RUN = 1000


def time_table(rows: Sequence[Row]) -> list[str]:
    """One line per setting: seconds, where they go, and what switches and probing add."""
    cost = compared(rows)
    lines = header(
        "method",
        "ZeRO stage",
        "s / step",
        "of full, ZeRO-2",
        "of LoRA r=128",
        "forward, backward, `step()`",
        "tokens/s",
        "lowest layer trained",
        "step after a switch, of the others",
        f"s / probing step (share of a run of {RUN})",
    )
    for one, mine in lines_of(cost):
        seconds = [step_seconds(row) for row in mine]
        cells = [
            one.label,
            str(one.stage),
            spread(seconds),
            *(spread(ratios(mine, cost, base, 2, step_seconds)) for base in ("full", "lora")),
            ", ".join(f"{_mean(mine, f'{part}_seconds'):.2f}" for part in ("forward", "backward", "step")),
            f"{_tokens(mine[0]) / statistics.median(seconds):.0f}",
            _lowest(mine),
            spread([ratio for row in mine for ratio in after_switch(row)]),
            _probing(mine, statistics.median(seconds)),
        ]
        lines.append(line(cells))
    return lines


def memory_table(rows: Sequence[Row]) -> list[str]:
    """One line per setting: memory of the process and of tensors alone, and what crosses ranks."""
    cost = compared(rows)
    lines = header(
        "method",
        "ZeRO stage",
        "peak RSS",
        "of it in steps, above the imports",
        "of LoRA r=128",
        "live tensors at rest, peak",
        "peak of LoRA r=128's",
        "sent per step (collectives)",
        "weights trained per step",
    )
    for one, mine in lines_of(cost):
        seen = [row["observed"] for row in mine]
        traffic = statistics.median(floors.wire_bytes(step["traffic"]) for step in seen)
        calls = statistics.median(sum(step["calls"].values()) for step in seen)
        live = (statistics.median(step[name] for step in seen) / 1e6 for name in ("rest_bytes", "peak_bytes"))
        cells = [
            one.label,
            str(one.stage),
            f"{statistics.median(row['peak_bytes'] for row in mine) / 1e9:.2f} GB",
            f"{spread([above_imports(row) / 1e9 for row in mine])} GB",
            spread(ratios(mine, cost, "lora", 2, above_imports)),
            ", ".join(f"{value:.0f}" for value in live) + " MB",
            spread(ratios(mine, cost, "lora", 2, live_peak)),
            f"{traffic / 1e6:.1f} MB ({calls:.0f})",
            f"{mine[0]['trainable'] / 1e6:.1f} M",
        ]
        lines.append(line(cells))
    return lines


def floor_table(rows: Sequence[Row]) -> list[str]:
    """One line per setting: measured over the least that the algorithm needs, and the reasons for what is above."""
    lines = header(
        "method",
        "ZeRO stage",
        *(f"{name}: of its floor" for name in FLOORS),
        "seconds above plain PyTorch: forward, backward, `step()`",
        "traffic's floor, seconds",
        f"why more than {EXPLAIN:g}",
    )
    for one, mine in lines_of(compared(rows)):
        found = {name: floor_ratios(name, mine) for name in FLOORS}
        traffic = [parts["traffic"] for parts in plain_seconds(mine)]
        cells = [
            *map(spread, found.values()),
            _above(mine),
            f"{statistics.fmean(traffic):.2f}" if traffic else "",
            _reasons(one, found, profiled=all(PROFILED.items() <= row.items() for row in mine)),
        ]
        lines.append(line([one.label, str(one.stage), *cells]))
    return lines


def cost_note(rows: Sequence[Row]) -> str:
    cost = compared(rows)
    one = cost[0]
    notes = {METHODS[row["method"]].label: METHODS[row["method"]].note for row in cost}
    notes |= {f"`{method}` is left out": reason for method, reason in NOT_RUN.items()}
    told = "".join(f" {label}: {note}." for label, note in notes.items() if note)
    return (
        f"{len({row['seed'] for row in cost})} interleaved rounds; variants once, beside the first. s / step: mean of a round's steps after "
        f"warm-up and probing; median of the rounds (least to most; a line without was measured once). Layers are drawn every {_periods(cost)} (default "
        f"{GrassConfig().sample_period}){_periods_of_others(cost)}; what a step costs depends on the lowest of them, so lines of one round "
        "compare with that round of others alone. Ratios are taken within a round, against the same "
        "accumulation and checkpointing. Forward, backward, `step()`: means. Live tensors: as a GPU's allocator would count them, in one "
        "more step that is not timed; optimizer state that rests in host memory does not count there, but does in RSS: that of the "
        f"layers drawn so far; once all have trained it is {host_state(one) / 1e9:.2f} GB per rank. Sent: what a ring of "
        f"many ranks would send; an all-reduce counts twice.{told}{_moved_frozen(cost)}{_lost_steps(cost)}"
    )


FLOOR_NOTE = (
    "Floors are closed forms (`benchmarks/floors.py`). FLOPs: forward, input gradients down to the lowest layer that trains, weight "
    "gradients of what trains. Traffic: one reduce-scatter of the gradients and one all-gather of the weights that train, and what ZeRO-3 "
    "gathers. Memory: weights, gradients, optimizer state on the device, activations that backward needs, logits; on ZeRO-3 also the "
    f"gathered weights that DeepSpeed keeps because they are needed again within {floors.REUSE_DISTANCE:.0e} elements "
    "(`stage3_max_reuse_distance`), in a model of this size all. Time: forward and backward of plain PyTorch, measured by the same "
    "processes right after the steps, ranks side by side, with the same layers trained; its fused AdamW, and traffic at the bandwidth "
    "measured then, as if nothing else ran: here ranks compute and send on the same cores. Reasons for time are seconds of a step under cProfile, "
    "at 7b61153; what they name includes the floor's own traffic."
)


def after_switch(row: Row) -> list[float]:
    """Seconds of each step with newly drawn layers over the median of the steps that follow with the same."""
    active, seconds, found = row["active"], row["seconds"], []
    for begin in range(1, len(active)):
        if active[begin] is None or active[begin] == active[begin - 1]:
            continue
        end = next((i for i in range(begin, len(active)) if active[i] != active[begin]), len(active))
        if end - begin > 1:
            found.append(seconds[begin] / statistics.median(seconds[begin + 1 : end]))
    return found


def above_imports(row: Row) -> float:
    return row["train_peak_bytes"] - row["baseline_bytes"]


def live_peak(row: Row) -> float:
    return row["observed"]["peak_bytes"]


def host_state(row: Row) -> float:
    """Bytes of Adam state of a rank once every layer has trained, by default in host memory."""
    shape = row["shape"]
    return STATE * (shape["layers"] * shape["layer_numel"] + shape["norm_numel"]) / row["ranks"]


def floor_ratios(name: str, rows: Sequence[Row]) -> list[float]:
    """Measured over floor, per row that has both."""
    found = [FLOORS[name](row) for row in rows]
    return [ratio for ratio in found if ratio is not None]


def _flops(row: Row) -> float | None:
    return row["observed"]["flops"] / floors.flops(row, row["observed"]["active"])


def _traffic(row: Row) -> float | None:
    floor = floors.wire_bytes(floors.traffic(row, row["observed"]["active"]))
    return floors.wire_bytes(row["observed"]["traffic"]) / floor if floor else None


def _memory(row: Row) -> float | None:
    return live_peak(row) / floors.memory(row, row["observed"]["active"])["total"]


def plain_seconds(rows: Sequence[Row]) -> list[dict[str, float]]:
    """The floor of every measured step of the rows that have one."""
    return [parts for row in rows if "plain" in row for parts in floors.seconds(row)]


def _seconds(row: Row) -> float | None:
    floor = plain_seconds([row])
    return sum(row["seconds"]) / sum(sum(parts.values()) for parts in floor) if floor else None


def _above(rows: Sequence[Row]) -> str:
    """Seconds of a step beyond the floor of each of its parts, but for traffic, which is within any of them."""
    floor = plain_seconds(rows)
    if not floor:
        return ""
    timed = [row for row in rows if "plain" in row]
    above = [
        _mean(timed, f"{part}_seconds") - statistics.fmean(parts[least] for parts in floor)
        for part, least in (("forward", "forward"), ("backward", "backward"), ("step", "adam"))
    ]
    return ", ".join(f"{value:+.2f}" for value in above)


FLOORS: dict[str, Callable[[Row], float | None]] = {
    "FLOPs": _flops,
    "traffic": _traffic,
    "memory": _memory,
    "time": _seconds,
}


def _reasons(one: Setting, found: dict[str, list[float]], *, profiled: bool) -> str:
    """``profiled``: reasons for time are of this hardware and precision."""
    above = [name for name, values in found.items() if values and statistics.median(values) > EXPLAIN]
    variant = one != Setting(one.method, one.stage)
    known = {name: reason for (*key, name), reason in REASONS.items() if key == [one.method, one.stage]}
    if not profiled:
        known.pop("time", None)
    if variant and "time" in known:
        known["time"] = "as without the variant"
    return "; ".join(f"{name}: {known.get(name, 'not explained')}" for name in above)


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(value for row in rows for value in row[name])


def _lowest(rows: Sequence[Row]) -> str:
    """Mean over steps; backward goes down to it."""
    lowest = [
        Case(row, active).lowest for row in rows if METHODS[row["method"]].grass for active in row["active"] if active
    ]
    return f"{statistics.fmean(lowest):.1f}" if lowest else ""


def _periods(rows: Sequence[Row]) -> str:
    """Steps between draws of our samplers, with the stages that it is measured on."""
    stages: dict[int, set[int]] = {}
    for row in rows:
        if METHODS[row["method"]].grass is not None and "sample_period" in row["grass"]:
            stages.setdefault(row["grass"]["sample_period"], set()).add(row["stage"])
    return ", ".join(
        f"{period} steps (ZeRO-{'/'.join(map(str, sorted(stages[period])))})" for period in sorted(stages)
    )


def _periods_of_others(rows: Sequence[Row]) -> str:
    draw = [row for row in rows if METHODS[row["method"]].toggles or METHODS[row["method"]].package]
    periods = {row["method"]: row["grass"]["sample_period"] for row in draw}
    return "".join(f", by `{method}` every {period}" for method, period in periods.items())


def _tokens(row: Row) -> int:
    """Tokens of an optimizer step, all ranks."""
    return row["ranks"] * row["micro_batch"] * row["accumulation"] * row["sequence"]


def _probing(mine: Sequence[Row], seconds: float) -> str:
    probing = [value for row in mine for value in row["probe_seconds"]]
    if not probing:
        return ""
    probe, steps = statistics.median(probing), GrassConfig().probe_steps
    return f"{probe:.2f} ({steps * probe / (steps * probe + (RUN - steps) * seconds):.1%})"


def _moved_frozen(rows: Sequence[Row]) -> str:
    """How many layers moved that ``requires_grad`` was to freeze."""
    moved = [count for row in rows if METHODS[row["method"]].toggles for count in row["moved_frozen"]]
    return f" Of the layers that toggling was to freeze, {spread(moved, 0)} moved per step." if moved else ""


def _lost_steps(rows: Sequence[Row]) -> str:
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
