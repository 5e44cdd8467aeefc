# SPDX-License-Identifier: Apache-2.0
"""A plan in words, as JSON, and the DeepSpeed config in a file."""

import json
from pathlib import Path
from typing import Any

from grass_ds.plan.request import Request
from grass_ds.plan.search import Plan, largest_gamma, largest_micro_batch, plan

NEEDS = ("ranks", "device_bytes", "host_bytes", "disk_bytes", "nvme_path")
NOTES = {
    "weights": "at rest; with ZeRO-3 this rank's part",
    "gradients": "whole ones and shards of what trains",
    "optimizer state": "that stays on the device",
    "activations": "and logits",
    "window": "buffers through which optimizer state passes",
    "gathered weights": "of ZeRO-3, on the way",
}


def report(request: Request, write: Path | None = None, as_json: bool = False) -> tuple[str, bool]:
    """The text of a plan, and whether it fits; ``write``: the file for the DeepSpeed config.

    Raises:
        ValueError: the model cannot be planned. OSError: the file cannot be written.
    """
    made = plan(request)
    sampled = request.method in ("grass", "lisa")
    gamma = largest_gamma(made.model, request) if sampled else 0
    rows = largest_micro_batch(made.model, request)
    if write is not None:
        write.write_text(json.dumps(made.config, indent=2) + "\n")
    if as_json:
        return json.dumps(summary(made, gamma, rows), indent=2), made.fits
    return "\n".join([*_lines(made, gamma, rows), *([f"DeepSpeed config: {write}"] if write else [])]), made.fits


def summary(made: Plan, gamma: int, rows: int) -> dict[str, Any]:
    """The plan in plain types; ``needs`` is what ``doctor --plan FILE`` reads."""
    found = made.prediction
    return {
        "fits": made.fits,
        "shortfalls": made.shortfalls,
        "stage": made.stage,
        "offload": made.device,
        "needs": made.needs,
        "device": found.device,
        "peak": found.peak.name,
        "activations_saved": found.saved,
        "state_per_step": found.stepped,
        "traffic": found.traffic,
        "flops": found.flops,
        "seconds": made.seconds,
        "largest_gamma": gamma,
        "largest_micro_batch": rows,
        "ds_config": made.config,
    }


def read_needs(file: Path) -> dict[str, Any]:
    """``needs`` of a :func:`summary` in a file. Raises ValueError if it is none."""
    try:
        needs = json.loads(file.read_text())["needs"]
        return {name: str(needs[name]) if name == "nvme_path" else int(needs[name]) for name in NEEDS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--plan {file}: not a plan ({type(error).__name__}: {error}); write one with `python -m grass_ds plan ... "
            f"--json > {file}`"
        ) from None


def _lines(made: Plan, gamma: int, rows: int) -> list[str]:
    asked, found, seconds = made.request, made.prediction, made.seconds
    where = {"none": "on the device", "cpu": "in host memory", "nvme": "on disk"}[made.device]
    active = f", {asked.gamma} of {len(made.model.layers.blocks)} layers at a time"
    form = "" if asked.method == "lora" else f" ({asked.state_format})"
    title = (
        f"{asked.model}: {made.model.numel / 1e9:.2f} B weights, {asked.method}"
        f"{active if asked.method in ('grass', 'lisa') else ''}, ZeRO-{made.stage} on {asked.ranks} x "
        f"{asked.device_bytes / 1e9:.0f} GB, optimizer state {where}{form}; {asked.micro_batch} x "
        f"{asked.sequence} tokens per device{', checkpointing' * asked.checkpointing}"
    )
    lines = [
        title,
        "",
        f"per rank, at the peak ({found.peak.name}):",
        *(f"  {name:<18}{_gb(nbytes)}  {NOTES[name]}" for name, nbytes in found.device.items()),
        f"  {'device':<18}{_gb(found.total)}  and {asked.reserve / 1e9:.1f} GB that stay free",
        f"  {'host':<18}{_gb(found.host)}  once all layers have trained",
        f"  {'disk':<18}{_gb(found.disk)}",
        "",
        f"per step: state {_gb(2 * found.stepped).strip()} in and out; between ranks "
        + (", ".join(f"{name} {_gb(nbytes).strip()}" for name, nbytes in found.traffic.items()) or "nothing"),
        "seconds per step, without overlap: " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()),
        "",
        "it fits" if made.fits else "it does not fit: " + "; ".join(made.shortfalls),
    ]
    if asked.method in ("grass", "lisa"):
        lines.append(f"largest gamma that fits: {gamma or 'none'}")
    return [*lines, f"largest micro-batch that fits: {rows or 'none'}"]


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:8.3f} GB"
