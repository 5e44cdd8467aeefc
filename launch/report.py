"""What a run ends with: one table on the terminal and the same numbers in report.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from grass_ds import GrassCallback
from launch import adapters, distributed
from launch.arguments import Arguments
from launch.hf_trainer import GrassTrainer, Stopwatch
from launch.preparation import Task

_WIDTH = 18  # of the labels


def engine_memory(engine: Any) -> dict[str, dict[str, int]]:
    """Bytes on this rank by category and tier: the engine's own account, or what can be seen of a stock engine."""
    grass = getattr(engine, "grass", None)
    if grass is not None:
        return dict(grass.memory(peak=True))
    optimizer = engine.optimizer.optimizer
    shards = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    moments = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    weights = sum(parameter.nbytes for parameter in engine.module.parameters())
    return {
        "weights": {"device": weights, "host": 0},
        "optimizer_state": {"device": sum(tensor.nbytes for tensor in (*shards, *moments)), "host": 0},
    }


def collect(
    options: Arguments, task: Task, trainer: GrassTrainer, stopwatch: Stopwatch, callback: GrassCallback
) -> dict[str, Any]:
    """The numbers of a finished run, but for what was measured around it."""
    grass = getattr(trainer.deepspeed, "grass", None)
    stage = options.ds_config.get("zero_optimization", {}).get("stage", 0)
    training, steps, ranks = options.training, trainer.state.global_step, distributed.world_size()
    folder = Path(str(training.output_dir)).resolve()
    method = options.method.method or (task.grass.sampler if task.grass else "stock")
    lora = options.lora()
    return {
        "model": options.model.model,
        "parameters": _count(trainer.model.parameters()) - _count(adapters.parameters(trainer.model)),
        "adapters": None if lora is None else _adapters(trainer.model, lora),
        "data": options.data.data,
        "train_rows": len(task.train),
        "tokens": task.token_count,
        "eval_rows": 0 if task.test is None else len(task.test),
        "loss_rows": 0 if task.test_tokens is None else len(task.test_tokens),
        "method": f"{method}, ZeRO-{stage}",
        "deepspeed": training.deepspeed,
        "ranks": ranks,
        "device": get_accelerator().device_name(),
        "precision": options.precision.as_dict(),
        "torch_threads": torch.get_num_threads(),
        "seed": training.seed,
        "learning_rate": training.learning_rate,
        "speed": {
            "steps": steps,
            "probe_steps": trainer.probe_steps_within(steps),
            "seconds_per_step": stopwatch.seconds / max(steps - stopwatch.first_step, 1),
            "tokens_per_second": callback.tokens_per_second or 0.0,
            "rows_per_step": training.train_batch_size * training.gradient_accumulation_steps * ranks,
        },
        "memory": engine_memory(trainer.deepspeed),
        "settings": options.settings(),
        "ds_config": options.ds_config,
        "layers": None if grass is None else list(grass.visits),
        "files": {
            "model": str(folder),
            "plots": [str(path.resolve()) for path in callback.plot_paths],
            "report": str(folder / "report.json"),
        },
    }


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)


def _adapters(model: torch.nn.Module, lora: adapters.Lora) -> dict[str, Any]:
    """What the adapters are; "parameters" counts all of theirs, "trained" those that train."""
    trained = _count(parameter for parameter in adapters.parameters(model) if parameter.requires_grad)
    return {**asdict(lora), "parameters": _count(adapters.parameters(model)), "trained": trained}


def save(report: Mapping[str, Any], folder: Path) -> Path:
    """Write report.json."""
    path = folder / "report.json"
    path.write_text(json.dumps(report, indent=2, default=str) + "\n")
    return path


def render(report: Mapping[str, Any]) -> str:
    """The report as text for a terminal."""
    speed, peak = report["speed"], report["peak_memory"]
    lines = [
        "",
        "-" * 78,
        _line("model", f"{report['model']}, {report['parameters'] / 1e6:.1f} M parameters"),
        _line("data", f"{report['data']}, {report['train_rows']} training rows"),
        _line(
            "tokens",
            f"{report['tokens']['all']} in these rows, {report['tokens']['trained_share']:.1%} of them trained",
        ),
        _line(
            "method", f"{report['method']} ({Path(report['deepspeed']).name}), {report['ranks']} x {report['device']}"
        ),
        *_adapter_line(report["adapters"]),
        _line("precision", f"{report['precision']['name']}, {report['precision']['reason']}"),
        *_accuracy(report),
        _line(
            "speed",
            f"{speed['tokens_per_second']:.0f} tokens/s, {speed['seconds_per_step']:.2f} s per step "
            f"({speed['steps']} steps of {speed['rows_per_step']} rows{_probing(speed['probe_steps'])})",
        ),
        _line("time", _time(report["seconds"])),
        _line("peak memory", f"{_size(peak['bytes'])} {peak['what']}, largest rank, while training"),
        *_memory(report["memory"]),
        *_layers(report["layers"]),
        _line("adapters saved in" if report["adapters"] else "model saved in", report["files"]["model"]),
    ]
    if report["files"]["plots"]:
        lines.append(_line("plots", ", ".join(report["files"]["plots"])))
    return "\n".join([*lines, _line("this report", report["files"]["report"]), "-" * 78])


def _adapter_line(adapter: Mapping[str, Any] | None) -> list[str]:
    if adapter is None:
        return []
    targets = adapter["targets"] if isinstance(adapter["targets"], str) else ", ".join(adapter["targets"])
    trained = f"{adapter['trained'] / 1e6:.1f} of {adapter['parameters'] / 1e6:.1f} M parameters train"
    return [_line("adapters", f"rank {adapter['rank']}, alpha {adapter['alpha']}, {targets}; {trained}")]


def _time(seconds: Mapping[str, float]) -> str:
    phases = {
        "start": "starting",
        "before": "measuring before",
        "training": "training",
        "saving": "saving",
        "after": "measuring after",
    }
    parts = ", ".join(f"{seconds[key]:.0f} s {name}" for key, name in phases.items())
    return f"{seconds['total'] / 60:.1f} min: {parts}"


def _probing(steps: int) -> str:
    return f", {steps} of them only measuring" if steps else ""


def _line(label: str, text: str) -> str:
    return f"{label:<{_WIDTH}}{text}"


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _accuracy(report: Mapping[str, Any]) -> list[str]:
    before, after = report["before"], report["after"]
    names = {"exact": "exact match", "choice": "right choices"}
    lines = []
    for key, value in after.items():
        if key == "loss":
            start = f"{before[key]:.3f} before, " if key in before else ""
            lines.append(_line("eval loss", f"{start}{value:.3f} after{_left_out(report)}"))
        else:
            start = f"{before[key]:.1%} before, " if key in before else ""
            lines.append(_line(names[key], f"{start}{value:.1%} after ({report['eval_rows']} test rows)"))
    return lines


def _left_out(report: Mapping[str, Any]) -> str:
    """What the loss does not measure: rows whose answer is longer than --max_length."""
    measured, rows = report["loss_rows"], report["eval_rows"]
    return "" if measured == rows else f" ({measured} of {rows} test rows, the others are too long)"


def _memory(memory: Mapping[str, Mapping[str, int]]) -> list[str]:
    names = [name for name in ("device", "host", "nvme") if any(name in sizes for sizes in memory.values())]
    lines = [_line("bytes on rank 0", "".join(f"{name:>12}" for name in names) + "   (peak)")]
    for category, sizes in memory.items():
        columns = "".join(f"{_size(sizes[name]) if name in sizes else '':>12}" for name in names)
        lines.append(_line("  " + category.replace("_", " "), columns.rstrip()))
    return lines


def _layers(layers: Sequence[int] | None) -> list[str]:
    if layers is None:  # of the model, or of its adapters
        return [_line("layers trained", "all of them at every step")]
    lines = [_line("layers trained", "layer:steps")]
    for start in range(0, len(layers), 10):
        row = "  ".join(f"{index}:{layers[index]}" for index in range(start, min(start + 10, len(layers))))
        lines.append(_line("", row))
    return lines
