"""Weights & Biases for launch/train.py: one run per job, over requeues, crashes and resumes.

The id of the run is kept in `<output_dir>/wandb_run.json`; WANDB_RUN_ID wins over it. Only global rank 0 talks to wandb,
and no failure of wandb ends training or keeps it from saving.

[Note: Steps] After a crash, the steps since the last checkpoint are computed again, bitwise the same. wandb has stored
all of them or lost the latest, which its process keeps in memory (up to 32 KiB offline) and which end with the job. So
on a resume the last stored step is asked of the server, or read from the offline files: steps up to it are not logged
again, and later ones of which the checkpoint has the Trainer's log rows are logged first.

[Note: Offline] With WANDB_MODE=offline every start writes a folder `wandb/offline-run-<time>-<id>`, marked as a
continuation: `wandb sync wandb/offline-run-*-<id>` uploads them in the order of their starts, as one run.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import secrets
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.utils import logger
from pydantic import ValidationError
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import WandbCallback, rewrite_logs

from grass_ds.cluster.preemption import PREEMPTED
from grass_ds.core.durable_files import replace_file
from launch import distributed

RUN_FILE = "wandb_run.json"
_STEP = "train/global_step"
_FINISH_SECONDS = 30.0
_HEADER_BYTES = 7  # of a .wandb file


def check(report_to: Sequence[str]) -> None:
    """End now, on every rank, rather than let rank 0 fail later, or at a login prompt, while the others wait for it.

    Raises:
        ValueError: wandb is asked for, but is not installed, has nobody logged in or does not take a WANDB_ variable.
    """
    if "wandb" not in report_to:
        return
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("--report_to wandb: the package is missing; run `pip install wandb`")
    if distributed.rank() != 0:
        return
    import wandb

    settings = wandb.Settings()
    for name, value in os.environ.items():
        try:
            settings.update_from_env_vars({name: value})
        except (ValidationError, wandb.Error) as error:
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise ValueError(f"--report_to wandb: {name}={value!r}: {what}; correct it or `unset {name}`") from error
    if settings.mode in ("offline", "dryrun", "disabled"):
        return
    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "--report_to wandb: nobody is logged in; run `wandb login`, or set WANDB_API_KEY, or set "
            "WANDB_MODE=offline to keep the run on this machine"
        )


def finish(exit_code: int) -> None:
    """End the run of this process, if there is one.

    At most half a minute (WANDB_FINISH_TIMEOUT) is given to what is not uploaded yet.

    Args:
        exit_code: of the program. wandb shows 0 as finished, `PREEMPTED` as preempted, which a requeued job continues,
            others as failed.
    """
    wandb = sys.modules.get("wandb")
    if wandb is None or wandb.run is None:
        return
    try:
        if exit_code == PREEMPTED:
            wandb.run.mark_preempting()
        wandb.run.finish(exit_code=exit_code)
    except Exception as error:
        _lost(error)


def _harmless(event: Callable[..., None]) -> Callable[..., None]:
    """Turn a failure of wandb in an event of the Trainer into a message: the other ranks go on."""

    @functools.wraps(event)
    def guarded(
        self: Any, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._wandb is None:
            return
        try:
            event(self, args, state, control, **kwargs)
        except Exception as error:
            _lost(error)
            self._wandb = None  # the parent's sign for "no wandb"

    return guarded


class WandbRun(WandbCallback):
    """The Trainer's wandb callback, for a job that may be started several times, see the notes of this module.

    Args:
        resuming: the user asked to go on from a checkpoint, whether there is one yet or not. Else a new run is begun.
    """

    def __init__(self, resuming: bool) -> None:
        super().__init__()
        self._resuming = resuming
        self._stored = 0

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        """Begin or continue the run, before the parent would begin one."""
        if state.is_world_process_zero:
            run = self._begin(args)
            if self._resuming:
                self._stored = _last_stored(run)
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            self._fill_in(state.log_history)

    on_train_begin = _harmless(WandbCallback.on_train_begin)
    on_train_end = _harmless(WandbCallback.on_train_end)
    on_save = _harmless(WandbCallback.on_save)
    on_predict = _harmless(WandbCallback.on_predict)

    @_harmless
    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log a step, unless it is stored already."""
        if state.global_step > self._stored:
            super().on_log(args, state, control, **kwargs)

    def _begin(self, args: TrainingArguments) -> Any:
        file = Path(str(args.output_dir)) / RUN_FILE
        run_id = os.environ.get("WANDB_RUN_ID")
        if run_id is None and self._resuming and file.is_file():
            run_id = json.loads(file.read_text())["id"]
        run_id = run_id or secrets.token_hex(4)
        file.parent.mkdir(parents=True, exist_ok=True)
        # Before wandb knows of the run: a crash in between must not lead to a second one.
        replace_file(file, json.dumps({"id": run_id}))
        seconds = float(os.environ.get("WANDB_FINISH_TIMEOUT", _FINISH_SECONDS))
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "huggingface"),
            name=args.run_name,
            id=run_id,
            resume=os.environ.get("WANDB_RESUME", "allow"),
            settings={"finish_timeout": seconds},
        )

    def _fill_in(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """Log what the checkpoint knows and wandb has lost."""
        for row in log_history:
            if row["step"] > self._stored:
                values = {key: value for key, value in row.items() if key != "step"}
                self._wandb.log({**rewrite_logs(values), _STEP: row["step"]})


def _lost(error: Exception) -> None:
    logger.warning(
        f"wandb failed ({type(error).__name__}: {error}): the program goes on without it. The next resume from a "
        "checkpoint fills in what the run misses"
    )


def _last_stored(run: Any) -> int:
    """The last step of the run that the server or an offline file of an earlier start has; 0 if there is none."""
    here = Path(run.dir).parent
    last = int(run.summary.get(_STEP, 0))
    for part in here.parent.glob(f"offline-run-*-{run.id}/run-{run.id}.wandb"):
        if part.parent == here:
            continue
        last = max([last, *_steps(part.read_bytes())])
        if part.stat().st_size <= _HEADER_BYTES:
            part.unlink()  # of a start that was killed at once: `wandb sync` refuses all parts for it
    return last


def _steps(data: bytes) -> Iterator[int]:
    """The steps in a .wandb file: protobuf in LevelDB's log format, the last perhaps torn. wandb has no reader."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    # A record is cut in chunks, each with its checksum, length and kind: 1 whole, 2 first, 3 middle, 4 last.
    block, header = 32768, struct.Struct("<IHB")
    position, record = _HEADER_BYTES, b""
    while position + header.size <= len(data):
        if block - position % block < header.size:
            position += block - position % block  # padding: no header crosses a block's end
            continue
        _, length, kind = header.unpack_from(data, position)
        position += header.size + length
        record += data[position - length : position]
        if kind in (1, 4) and position <= len(data):
            items = messages.Record.FromString(record).history.item
            yield from (int(item.value_json) for item in items if (item.key or ".".join(item.nested_key)) == _STEP)
            record = b""
