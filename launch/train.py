"""Fine-tune a language model with the Hugging Face Trainer under DeepSpeed, and measure it before and after.

    deepspeed launch/train.py --deepspeed ds_configs/grass.json

trains SmolLM2-135M on the built-in arithmetic task; `--help` lists every option. A mistake in them ends the program on
every rank, before training, with one message and a non-zero exit code (GRASS_TRACEBACK=1 shows where it was found).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Run as a script: look for modules in the project, not in launch/, whose evaluate.py would hide a library's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.interrupt  # noqa: I001  # before what takes seconds to import
import launch.packages  # noqa: F401  # before a name that is not there
import datasets
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.integrations import WandbCallback

import grass_ds
from grass_ds.config import parse_grass_block
from grass_ds.sampling.controller import Controller
from grass_ds.core.deepspeed_compat import DeepSpeedConfigError
from grass_ds.validation import check_ds_config, check_model
from launch import arguments as command_line
from launch import distributed, inspection, report, tracking
from launch.callbacks import LastCheckpoint, Stopwatch, TerminalLines, TerminalProgress
from launch.evaluate import choice_accuracy, choose_task, exact_match, mean_loss
from launch.model import check_saving, check_tokens, largest_token, largest_token_read, load_model, load_tokenizer
from launch.resume import wants_to_resume
from launch.rows import Rows, load_splits, load_test, summary
from launch.template import Template
from launch.tokens import Collator, tokenize
from launch.trainer import GrassTrainer

UserError = (ValueError, OSError, DeepSpeedConfigError)


@dataclass
class Task:
    """Everything a run needs beside the model, checked: the tokens to train on and what to measure."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    train: datasets.Dataset
    test: Rows | None
    test_tokens: datasets.Dataset | None
    measure: str
    token_count: inspection.TokenCount


# ---- preparing ------------------------------------------------------------------------------------------------------


def prepare(options: command_line.Arguments) -> Task:
    """Load and check everything but the model; nothing that a user can get wrong is left for later.

    Raises:
        ValueError: whatever is wrong with the data or the configuration.
    """
    tracking.check(options.training.report_to)
    config = parse_grass_block(options.ds_config)
    if config is not None:
        check_ds_config(options.ds_config, config)
    splits = _load_data(options)
    tokenizer = load_tokenizer(options.model.model)
    template = Template.choose(tokenizer, options.data.template)
    train = splits["train"].take(options.data.train_samples)
    length, on_long_answer = options.data.max_length, options.data.on_long_answer
    train_tokens = tokenize(train, template, length, on_long_answer, options.data.on_long_row)
    test = splits["test"].take(options.evaluation.eval_samples) if "test" in splits else None
    measure = _measure(options.evaluation.eval_task, test)
    test_tokens = tokenize(test, template, length, "drop") if test is not None and measure != "none" else None
    ranks, partitioned = distributed.world_size(), options.ds_config.get("zero_optimization", {}).get("stage") == 3
    if partitioned and measure != "none" and test is not None and len(test) < ranks:
        raise ValueError(f"{len(test)} test rows for {ranks} ranks: evaluation with ZeRO-3 needs one per rank")
    count = inspection.count_tokens(train_tokens)
    return Task(tokenizer, template, train_tokens, test, test_tokens, measure, count)


def prepare_model(options: command_line.Arguments, task: Task) -> tuple[PreTrainedModel, Callable[[int], int]]:
    """The model, and how many of a number of steps only measure it.

    Raises:
        ValueError: whatever is wrong with the model, and with the folder that it will be saved in.
    """
    model = load_model(options.model.model, options.precision.name, task.tokenizer)
    check_tokens(model, options.model.model, task.tokenizer, _largest_token(task))
    if distributed.rank() == 0:
        zero = options.ds_config.get("zero_optimization", {})
        check_saving(model, task.tokenizer, Path(str(options.training.output_dir)), zero)
    config = parse_grass_block(options.ds_config)
    if config is None:
        return model, lambda steps: 0
    layers = check_model(model, config)
    probe_steps_within = Controller(len(layers.names), **config.controller_arguments()).probe_steps_within
    steps = options.training.max_steps
    if 0 < steps == probe_steps_within(steps):
        raise ValueError(
            f"--max_steps {steps} leaves nothing to train: the first grass.probe_steps = {config.probe_steps} steps only "
            "measure; raise --max_steps or lower probe_steps"
        )
    return model, probe_steps_within


def _load_data(options: command_line.Arguments) -> dict[str, Rows]:
    data, hold_out = options.data, options.data.eval_data is None and options.evaluation.eval_task != "none"
    splits = load_splits(data.data, data.data_config, encoding=data.encoding, hold_out=hold_out)
    if "train" not in splits:
        raise ValueError(f"--data {data.data}: has test rows only; give a source with training rows")
    if data.eval_data is not None:
        if "test" in splits:
            splits["train"] = splits["train"].leaving(f"{splits['test'].source} (--eval_data takes its place)")
        splits["test"] = load_test(data.eval_data, data.data_config, encoding=data.encoding)
    if distributed.rank() == 0:
        measured = None if options.evaluation.eval_task == "none" else splits.get("test")
        line = summary(splits["train"], data.train_samples, measured, options.evaluation.eval_samples)
        print(f"data: {line}", flush=True)
    return splits


def _largest_token(task: Task) -> int:
    """The largest token that the model will read."""
    tokens = [largest_token(rows) for rows in (task.train, task.test_tokens) if rows is not None]
    if task.test is not None:
        tokens.append(largest_token_read(task.template, task.test, task.measure))
    return max(*tokens, task.tokenizer.pad_token_id)


def _measure(wanted: str, test: Rows | None) -> str:
    """The task to measure: "exact", "choice", "loss" or "none".

    Raises:
        ValueError: no test rows, or one that the wanted task cannot be measured on.
    """
    if test is None:
        if wanted not in ("auto", "none"):
            raise ValueError(f"--eval_task {wanted}: the data has no test rows; name some with --eval_data")
        return "none"
    return choose_task(wanted, test)


# ---- running --------------------------------------------------------------------------------------------------------


def measure(task: Task, model: PreTrainedModel, options: command_line.Arguments) -> dict[str, float]:
    """Accuracy (in [0, 1], unless only the loss can be measured) and loss (nats per answer token) on the test rows."""
    if task.test is None or task.test_tokens is None:
        return {}
    batch = options.training.per_device_eval_batch_size
    results = {}
    if task.measure == "exact":
        new = options.evaluation.max_new_tokens
        results["exact"] = exact_match(model, task.template, task.test, batch_size=batch, max_new_tokens=new)
    elif task.measure == "choice":
        results["choice"] = choice_accuracy(model, task.template, task.test, batch_size=batch)
    results["loss"] = mean_loss(model, task.template, list(task.test_tokens), batch_size=max(1, batch // 4))
    return results


def run(options: command_line.Arguments, preemption: grass_ds.Preemption) -> int:
    """Measure, train, measure, save and report; returns the exit status, `PREEMPTED` if the scheduler ended training before its time."""
    set_seed(options.training.seed)
    resuming = wants_to_resume(options.training.resume_from_checkpoint)
    options.precision.announce()
    task = distributed.on_every_rank(lambda: prepare(options))
    _show_rows(task, options.data.inspect or 1)
    if options.data.inspect is not None:
        return 0
    model, probe_steps_within = distributed.on_every_rank(lambda: prepare_model(options, task), at_once=True)
    folder = Path(str(options.training.output_dir))
    stopwatch = Stopwatch(
        lambda: measure(task, model, options), folder / "before.json", save=lambda: trainer.save_model()
    )

    grass_ds.enable()
    callback = grass_ds.GrassCallback()
    trainer = GrassTrainer(
        model=model,
        args=options.training,
        train_dataset=task.train,
        data_collator=Collator(task.tokenizer.pad_token_id),
        processing_class=task.tokenizer,
        callbacks=[stopwatch, callback, grass_ds.PreemptionCallback(preemption)],
        probe_steps_within=probe_steps_within,
    )
    trainer.remove_callback(PrinterCallback if options.training.disable_tqdm else ProgressCallback)
    trainer.add_callback(TerminalLines if options.training.disable_tqdm else TerminalProgress)
    if "wandb" in options.training.report_to:
        trainer.remove_callback(WandbCallback)
        trainer.add_callback(tracking.WandbRun(resuming))
    if resuming:
        trainer.add_callback(LastCheckpoint)
    try:
        return _train_and_report(options, task, trainer, stopwatch, callback, preemption)
    except Exception as error:
        if stopwatch.saved and distributed.first_to_fail(otherwise=not distributed.is_communication_error(error)):
            print(
                f"\ntraining is complete, and the trained model is in {folder.resolve()}; what failed came after it",
                file=sys.stderr,
            )
        raise


def _train_and_report(
    options: command_line.Arguments,
    task: Task,
    trainer: GrassTrainer,
    stopwatch: Stopwatch,
    callback: grass_ds.GrassCallback,
    preemption: grass_ds.Preemption,
) -> int:
    """What `run` does once the Trainer stands; the model is saved by the stopwatch, in the last step."""
    trainer.train(resume_from_checkpoint=options.checkpoint)
    if preemption.reason:
        _say_where_to_go_on(preemption, trainer)
        return grass_ds.PREEMPTED
    if not stopwatch.saved or options.training.load_best_model_at_end:
        # Resumed from the last step, there was no step to save in; and the best model is another than that of the last step.
        stopwatch.save()
    if wants_to_resume(options.training.resume_from_checkpoint) and preemption.agreed():
        _say_where_to_go_on(preemption, trainer)
        return grass_ds.PREEMPTED
    saved = time.time()
    after = measure(task, trainer.model, options)
    seconds = {
        "before": stopwatch.before_seconds,
        "training": stopwatch.seconds,
        "saving": stopwatch.saving_seconds,
        "after": time.time() - saved,
    }
    total = time.time() - psutil.Process().create_time()

    numbers = _report(options, task, trainer, stopwatch, callback)
    numbers["seconds"] = {"total": total, "start": total - sum(seconds.values()), **seconds}
    numbers |= {"before": stopwatch.before, "after": after, "peak_memory": report.peak_memory(stopwatch.peak_memory)}
    if trainer.is_world_process_zero():
        print(report.render(numbers), flush=True)
        report.save(numbers, Path(str(options.training.output_dir)))
    return 0


def _show_rows(task: Task, number: int) -> None:
    """What the model will see and learn, before hours are spent on it."""
    if distributed.rank() == 0:
        print(inspection.show(task.tokenizer, task.train, number), flush=True)


def _say_where_to_go_on(preemption: grass_ds.Preemption, trainer: GrassTrainer) -> None:
    if trainer.is_world_process_zero():
        folder, step = trainer.args.output_dir, trainer.state.global_step
        print(
            f"stopped by {preemption.reason} with checkpoint-{step} in {folder} (exit code {grass_ds.PREEMPTED}); to go on: the same command "
            "with --resume_from_checkpoint true",
            flush=True,
        )


def _report(
    options: command_line.Arguments,
    task: Task,
    trainer: GrassTrainer,
    stopwatch: Stopwatch,
    callback: grass_ds.GrassCallback,
) -> dict[str, Any]:
    """The numbers of the finished run, but for what was measured around it."""
    config = parse_grass_block(options.ds_config)
    grass = getattr(trainer.deepspeed, "grass", None)
    stage = options.ds_config.get("zero_optimization", {}).get("stage", 0)
    steps = trainer.state.global_step
    training = options.training
    folder = Path(str(training.output_dir)).resolve()
    return {
        "model": options.model.model,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters()),
        "data": options.data.data,
        "train_rows": len(task.train),
        "tokens": task.token_count.as_dict(),
        "eval_rows": 0 if task.test is None else len(task.test),
        "loss_rows": 0 if task.test_tokens is None else len(task.test_tokens),
        "method": f"{config.sampler if config else 'stock'}, ZeRO-{stage}",
        "deepspeed": training.deepspeed,
        "ranks": distributed.world_size(),
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
            "rows_per_step": training.train_batch_size
            * training.gradient_accumulation_steps
            * distributed.world_size(),
        },
        "memory": report.engine_memory(trainer.deepspeed),
        "layers": None if grass is None else list(grass.visits),
        "files": {
            "model": str(folder),
            "plots": [str(path.resolve()) for path in callback.plot_paths],
            "report": str(folder / "report.json"),
        },
    }


def run_watched(preemption: grass_ds.Preemption) -> int:
    """Parse the command line and `run`, with an end that says who is missing when a rank is lost."""
    with ExitStack() as stack:
        heartbeats: list[grass_ds.Heartbeat] = []

        def watch(limit: float) -> None:
            heartbeats.append(stack.enter_context(grass_ds.Heartbeat(limit, interval=min(5.0, limit / 6))))

        try:
            status = run(command_line.parse(started=watch), preemption)
        except RuntimeError as error:
            if distributed.is_communication_error(error) and heartbeats:
                if distributed.first_to_fail(otherwise=False):
                    first_line = str(error).splitlines()[0]
                    print(
                        f"[rank {distributed.rank()}] {first_line}\nwaiting to learn whether a rank is lost",
                        file=sys.stderr,
                        flush=True,
                    )
                heartbeats[0].wait_for_cause()
            raise
        tracking.finish(status)
        if status == grass_ds.PREEMPTED:
            # Launchers kill the rest as soon as one process has ended with an error, and rank 0 may just have become ready.
            distributed.barrier()
        return status


def main() -> int:
    """Run the command line; the exit status."""
    preemption, status = grass_ds.Preemption(), 1
    try:
        status = run_watched(preemption)
    except UserError as error:
        if os.environ.get("GRASS_TRACEBACK"):
            traceback.print_exc()
        distributed.report_error(error)
    except Exception as error:
        if distributed.first_to_fail(otherwise=not distributed.is_communication_error(error)):
            raise
    finally:
        tracking.finish(status)
        distributed.stop()
        preemption.end()
    return status


if __name__ == "__main__":
    sys.exit(main())
