# SPDX-License-Identifier: Apache-2.0
"""What the files in the folder of a run say about it."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grass_ds.core.dotted_paths import value_at
from grass_ds.trainer.history import History

REPORT = "report.json"  # of launch/train.py
STATE = "trainer_state.json"  # of the Trainer, in the folder or in its checkpoints
HISTORY = "grass_history.jsonl"  # of GrassCallback
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_METHOD = re.compile(r"(.+), ZeRO-(\d)")
# Numbers of the run in the report that are settings, not results.
_FACTS = ("data", "train_rows", "eval_rows", "ranks", "device", "torch_threads", "seed", "learning_rate")
_TRAINER_SETTINGS = ("max_steps", "num_train_epochs", "train_batch_size", "logging_steps", "eval_steps", "save_steps")


@dataclass
class SavedRun:
    """A run as its files describe it; None where they do not.

    Attributes:
        name: the folder's.
        method: of ``launch/train.py``, or the sampler.
        stage: of ZeRO.
        model: folder or hub name.
        steps: optimizer steps, probing included.
        loss_before, loss_after: on the test rows, in nats per token.
        accuracy_before, accuracy_after: share of the test rows, in [0, 1].
        seconds: of training.
        tokens_per_second: of all ranks, over the run; of a Trainer's own loop the mean of what it logged.
        device_bytes: of weights, gradients and optimizer state on the device of rank 0.
        peak_memory: of the largest rank while training, in bytes.
        losses: step and training loss of every log line.
        history: who trained when; None where all layers trained, or nobody wrote it.
        settings: what was chosen, by source, each flat with dotted names.
    """

    name: str
    method: str | None = None
    stage: int | None = None
    model: str | None = None
    steps: int | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    device_bytes: float | None = None
    peak_memory: float | None = None
    losses: list[tuple[float, float]] = field(default_factory=list)
    history: History | None = None
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_all(folders: Sequence[str]) -> list[SavedRun]:
    """The runs in these folders, in this order. Where two folders have one name, a run has the path as its name.

    Raises:
        ValueError: see :func:`load`.
    """
    runs = [load(Path(folder)) for folder in folders]
    names = [run.name for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run.name) > 1:
            run.name = folder
    return runs


def load(folder: Path) -> SavedRun:
    """Read a folder of ``launch/train.py``, or of a Trainer with a ``GrassCallback``.

    Raises:
        ValueError: the folder is missing, has no file of a run, or one that is damaged; names it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    report, state = _read(folder / REPORT), _read(_state_file(folder))
    history = _read_history(folder / HISTORY)
    if report is None and state is None and history is None:
        raise ValueError(
            f"{folder}: not the folder of a run: has no {REPORT} (launch/train.py writes it), no {STATE} (the Trainer, "
            f"here or in checkpoint-N) and no {HISTORY} (GrassCallback)"
        )
    run = SavedRun(folder.resolve().name, history=history)
    if history is not None:
        _add_history(run, history)
    if state is not None:
        _add_state(run, state)
    if report is not None:
        _add_report(run, report)
    return run


def _add_history(run: SavedRun, history: History) -> None:
    run.method = history.sampler
    run.steps = history.rows[-1].step if history.rows else 0
    run.settings["history"] = {"sampler": history.sampler, "num_active_layers": history.num_active_layers}


def _add_state(run: SavedRun, state: Mapping[str, Any]) -> None:
    log = state.get("log_history")
    rows = [row for row in log if isinstance(row, Mapping)] if isinstance(log, list) else []
    run.steps = _integer(state, "global_step") or run.steps
    run.losses = _series(rows, "loss")
    evaluated = _series(rows, "eval_loss")
    run.loss_before = next((loss for step, loss in evaluated if step == 0), None)
    run.loss_after = next((loss for step, loss in reversed(evaluated) if step > 0), None)
    run.seconds = _last(rows, "train_runtime")
    run.device_bytes = _last(rows, "grass/bytes/device")
    rates = [rate for _, rate in _series(rows, "tokens_per_second")]
    run.tokens_per_second = sum(rates) / len(rates) if rates else None
    run.settings["trainer"] = {key: state[key] for key in _TRAINER_SETTINGS if key in state}


def _add_report(run: SavedRun, report: Mapping[str, Any]) -> None:
    """Results and settings of the report, which has all that the other files have and more."""
    method, model = report.get("method"), report.get("model")
    if isinstance(method, str):
        named = _METHOD.fullmatch(method)
        run.method, run.stage = (named[1], int(named[2])) if named else (method, None)
    run.model = model if isinstance(model, str) else None
    run.steps = _integer(report, "speed.steps") or run.steps
    for when in ("before", "after"):
        loss = _number(report, f"{when}.loss")
        setattr(run, f"loss_{when}", getattr(run, f"loss_{when}") if loss is None else loss)
        accuracy = _number(report, f"{when}.exact")
        setattr(run, f"accuracy_{when}", _number(report, f"{when}.choice") if accuracy is None else accuracy)
    run.seconds = _first(_number(report, "seconds.training"), run.seconds)
    run.tokens_per_second = _first(_number(report, "speed.tokens_per_second"), run.tokens_per_second)
    run.peak_memory = _number(report, "peak_memory.bytes")
    memory = report.get("memory")
    if isinstance(memory, Mapping):
        sizes = [_number(memory, f"{category}.device") for category in memory]
        run.device_bytes = sum(size for size in sizes if size is not None)
    facts = {key: report.get(key) for key in _FACTS} | {"precision": value_at(report, "precision.name")}
    run.settings = {"run": facts}
    for source, key in (("option", "settings"), ("config", "ds_config")):
        if isinstance(report.get(key), Mapping):
            run.settings[source] = dict(_flat(report[key]))


def _state_file(folder: Path) -> Path:
    """The Trainer's state: of the whole run, or of the newest checkpoint that has one."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    checkpoints.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    candidates = [folder / STATE, *(path / STATE for path in checkpoints)]
    return next((path for path in candidates if path.is_file()), folder / STATE)


def _read(file: Path) -> Mapping[str, Any] | None:
    """A JSON object; None: there is no such file."""
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold a JSON object, not a {type(content).__name__}")
    return content


def _read_history(file: Path) -> History | None:
    if not file.is_file():
        return None
    history = History.load(file)
    count, last = len(history.layers), 0
    for row in history.rows:
        layers = row.active_layers
        if type(row.step) is not int or row.step <= last:
            raise ValueError(f"{file}: step {row.step!r} after step {last}")
        if not all(type(layer) is int and 0 <= layer < count for layer in layers):
            raise ValueError(f"{file}: step {row.step} has layers {list(layers)}, the model has 0 to {count - 1}")
        last = row.step
    return history


def _number(source: Any, path: str) -> float | None:
    """The number at a dotted path; None: there is none."""
    value = value_at(source, path)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _integer(source: Any, path: str) -> int | None:
    value = value_at(source, path)
    return value if type(value) is int else None


def _first(*values: float | None) -> float | None:
    return next((value for value in values if value is not None), None)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Step and value of the log lines that have both."""
    pairs = ((_number(row, "step"), _value(row, key)) for row in rows)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _last(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((value for row in reversed(rows) if (value := _value(row, key)) is not None), None)


def _value(row: Mapping[str, Any], key: str) -> float | None:
    return _number({"value": row.get(key)}, "value")  # a key of a log line may have dots


def _flat(source: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, which are no objects."""
    for key, value in source.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
