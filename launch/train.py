"""Fine-tune a language model with the Hugging Face Trainer under DeepSpeed, and measure it before and after.

    deepspeed launch/train.py --method grass

trains SmolLM2-135M on the built-in arithmetic task; `--help` lists every option. A mistake in them ends the program on
every rank, before training, with one message and a non-zero exit code (GRASS_TRACEBACK=1 shows where it was found).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):
    # Run as a script: look for modules in the project, not in launch/, whose evaluate.py would hide a library's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.startup  # noqa: F401, I001  # before what takes seconds to import
import psutil
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, set_seed
from transformers.integrations import WandbCallback

import grass_ds
from grass_ds.core.deepspeed_compat import DeepSpeedConfigError
from launch import arguments as command_line
from launch import distributed, peak_memory, report, tracking
from launch.data import preview
from launch.data.tokenization import Collator
from launch.evaluation.measures import choice_accuracy, exact_match, mean_loss
from launch.hf_trainer import GrassTrainer, LastCheckpoint, Stopwatch, TerminalLines, TerminalProgress
from launch.preparation import Task, prepare, prepare_model
from launch.resume import wants_to_resume

UserError = (ValueError, OSError, DeepSpeedConfigError)


@dataclass
class Run:
    """A run once its Trainer is built."""

    options: command_line.Arguments
    task: Task
    preemption: grass_ds.Preemption
    trainer: GrassTrainer
    stopwatch: Stopwatch
    callback: grass_ds.GrassCallback


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
    """Measure, train, measure, save and report; the exit status: `PREEMPTED` if the scheduler ended training early."""
    set_seed(options.training.seed)
    options.precision.announce()
    task = distributed.on_every_rank(lambda: prepare(options))
    if distributed.rank() == 0:  # what the model will see and learn, before hours are spent on it
        print(preview.show(task.tokenizer, task.train, options.data.inspect or 1), flush=True)
    if options.data.inspect is not None:
        return 0
    model, probe_steps_within = distributed.on_every_rank(lambda: prepare_model(options, task), at_once=True)
    folder = Path(str(options.training.output_dir))
    stopwatch = Stopwatch(
        lambda: measure(task, model, options), folder / "before.json", save=lambda: trainer.save_model()
    )
    grass_ds.enable()
    trainer = GrassTrainer(
        model=model,
        args=options.training,
        train_dataset=task.train,
        data_collator=Collator(task.tokenizer.pad_token_id),
        processing_class=task.tokenizer,
        callbacks=[stopwatch, grass_ds.PreemptionCallback(preemption)],
        probe_steps_within=probe_steps_within,
    )
    _choose_callbacks(trainer, wants_to_resume(options.training.resume_from_checkpoint))
    callback = grass_ds.attach(trainer)
    try:
        return _train_and_report(Run(options, task, preemption, trainer, stopwatch, callback))
    except Exception as error:
        if stopwatch.saved and distributed.speaks_of(error):
            print(
                f"\ntraining is complete, and the trained model is in {folder.resolve()}; what failed came after it",
                file=sys.stderr,
            )
        raise


def _choose_callbacks(trainer: GrassTrainer, resuming: bool) -> None:
    """The Trainer's own callbacks give way to ours."""
    quiet = trainer.args.disable_tqdm
    trainer.remove_callback(PrinterCallback if quiet else ProgressCallback)
    trainer.add_callback(TerminalLines if quiet else TerminalProgress)
    if "wandb" in trainer.args.report_to:
        trainer.remove_callback(WandbCallback)
        trainer.add_callback(tracking.WandbRun(resuming))
    if resuming:
        trainer.add_callback(LastCheckpoint)


def _train_and_report(run: Run) -> int:
    """Train and save, then measure and report; the exit status."""
    training, stopwatch = run.options.training, run.stopwatch
    run.trainer.train(resume_from_checkpoint=run.options.checkpoint)
    if run.preemption.reason:
        return _preempted(run)
    if not stopwatch.saved or training.load_best_model_at_end:
        # Resumed from the last step, there was no step to save in; and the best model may not be that of the last
        # step.
        stopwatch.save()
    if wants_to_resume(training.resume_from_checkpoint) and run.preemption.agreed():
        return _preempted(run)
    saved = time.time()
    after = measure(run.task, run.trainer.model, run.options)
    seconds = {
        "before": stopwatch.before_seconds,
        "training": stopwatch.seconds,
        "saving": stopwatch.saving_seconds,
        "after": time.time() - saved,
    }
    total = time.time() - psutil.Process().create_time()
    numbers = report.collect(run.options, run.task, run.trainer, stopwatch, run.callback)
    numbers["seconds"] = {"total": total, "start": total - sum(seconds.values()), **seconds}
    numbers |= {
        "before": stopwatch.before,
        "after": after,
        "peak_memory": peak_memory.over_ranks(stopwatch.peak_memory),
    }
    if run.trainer.is_world_process_zero():
        print(report.render(numbers), flush=True)
        report.save(numbers, Path(str(training.output_dir)))
        run.trainer.save_state()  # trainer_state.json, with the loss of every log line
    return 0


def _preempted(run: Run) -> int:
    """Say where to continue; the exit status."""
    if run.trainer.is_world_process_zero():
        folder, step = run.trainer.args.output_dir, run.trainer.state.global_step
        print(
            f"stopped by {run.preemption.reason} with checkpoint-{step} in {folder} (exit code {grass_ds.PREEMPTED}); "
            "to go on: the same command with --resume_from_checkpoint true",
            flush=True,
        )
    return grass_ds.PREEMPTED


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
            # Launchers kill the rest as soon as one process has ended with an error, and rank 0 may just have become
            # ready.
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
        if distributed.speaks_of(error):
            raise
    finally:
        tracking.finish(status)
        distributed.stop()
        preemption.end()
    return status


if __name__ == "__main__":
    sys.exit(main())
