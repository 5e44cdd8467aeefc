# SPDX-License-Identifier: Apache-2.0
"""`GrassCallback`: metrics, history and plots of a GRASS run under the HF Trainer (and TRL's trainers).

The sampling itself happens in the engine; the callback only watches, so a run without it trains the same. This is the
only module of the library that imports transformers.
"""

import importlib.util
import inspect
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401  # before transformers: some of their releases import each other in a circle
from accelerate.state import AcceleratorState, is_initialized
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback, rewrite_logs
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from grass_ds.cluster.preemption import Preemption, ignore_signals
from grass_ds.config import GrassConfig, parse_grass_block
from grass_ds.trainer.metrics import History, HistoryRow, Throughput, grass_metrics, grass_summary
from grass_ds.trainer.plots import save_plots
from grass_ds.trainer.retention import CheckpointKeeper
from grass_ds.trainer.token_counter import TokenCounter

logger = logging.get_logger(__name__)

HISTORY_FILE = "grass_history.jsonl"
PLOTS_FOLDER = "plots"


class GrassCallback(TrainerCallback):
    """Report a GRASS run through the HF Trainer.

        grass_ds.enable()
        trainer = Trainer(model, args, callbacks=[GrassCallback()], ...)

    - Raises `RuntimeError` when training begins if the DeepSpeed config has an enabled `"grass"` block but the engine
      is not a `GrassEngine`: the block would be ignored and every layer trained.
    - Every training log gets the few values of `grass_summary` and `tokens_per_second`. The callback moves itself to the
      front of the Trainer's callbacks, so that wandb, TensorBoard and the console all see them (the HF integrations
      prefix them with `train/`).
    - wandb and TensorBoard get all values of `grass_metrics` besides, three or four per layer, under the same prefix. A
      failure there is said once, and training goes on.
    - `<output_dir>/grass_history.jsonl` gets one row per step, on global rank 0. Resuming from a checkpoint drops the
      rows after it; a file that cannot be continued is set aside as `grass_history.jsonl.old`.
    - Every checkpoint of a GRASS run is sealed with `grass_trainer.json`, by which `grass_ds.last_checkpoint` tells a complete
      one from what a killed job left. `save_total_limit` counts complete checkpoints only, so that it never removes the
      only good one: the callback keeps it in the Trainer's place, and `args.save_total_limit` is None while training
      runs (and after a `train()` that failed, until the next). With `save_only_model` and in a hyperparameter search
      both are left to the Trainer.
    - Training ends when the checkpoint under way, if there is one, is published.
    - When training ends, `<output_dir>/plots/*.png` are drawn on global rank 0 and sent to wandb if a run is active.

    Without DeepSpeed or without a `"grass"` block only `tokens_per_second` is reported, so one script serves every
    method that is to be compared.

    `tokens_per_second` counts the input tokens of all ranks over training time (no evaluation, no saving). With
    `TrainingArguments(include_num_input_tokens_seen="non_padding" | "all")` it uses the Trainer's own count. Without,
    it counts the tokens, padding included, that this rank's model reads, and multiplies by the number of ranks: no
    synchronisation, and exact when all ranks have batches of the same shape.

    Pickling or copying keeps none of the run's objects: the copy is as good as new. It is not an `ExportableState`:
    what a resume needs is in the engine's checkpoint and in the history file, and the Trainer would replace the
    user's instance by a new one.

    Attributes:
        history: the recorded steps on global rank 0 of a GRASS run, else None.
        plot_paths: the PNG files, once drawn.
    """

    def __init__(self) -> None:
        self.history: History | None = None
        self.plot_paths: list[Path] = []
        self._details_failed = False
        self._handle: Any = None
        self._keeper: CheckpointKeeper | None = None
        self._row: HistoryRow | None = None
        self._throughput: Throughput | None = None
        self._token_counter: TokenCounter | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **GrassCallback().__dict__}

    @property
    def tokens_per_second(self) -> float | None:
        """Average over the run so far, all ranks together; None before the first step."""
        return None if self._throughput is None else self._throughput.average

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the engine and open the history. The Trainer has built the engine and loaded the checkpoint by now.

        Raises:
            RuntimeError: the config asks for GRASS and the engine does not do it.
        """
        self._release()
        self._handle = _find_handle(kwargs.get("model"), kwargs.get("optimizer"))
        config = _grass_config(args)
        if config is not None and self._handle is None:
            raise RuntimeError(
                'the DeepSpeed config has an enabled "grass" block, but the engine in use is not a GrassEngine and '
                "would train every layer at every step; call grass_ds.enable() before building the Trainer, or remove "
                "the block"
            )
        self._move_to_front()
        if self._handle is not None and not args.save_only_model and not state.is_hyper_param_search:
            self._keeper = CheckpointKeeper(args)
        self._token_counter = TokenCounter(kwargs.get("model"), state, args)
        self._throughput = Throughput()
        self.history = None
        self.plot_paths = []
        if config is not None and state.is_world_process_zero:
            path = Path(str(args.output_dir)) / HISTORY_FILE
            self.history = _open_history(self._handle, config, path, state.global_step)
            if importlib.util.find_spec("matplotlib") is None:
                logger.warning("matplotlib is not installed: no plots will be drawn at the end of training")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what this step trains, before the engine draws the next set at its end."""
        if self._throughput is not None and self._throughput.average is None:
            self._throughput.start()  # a resumed run may have spent minutes on skipping data
        if self.history is not None:
            self._row = HistoryRow.observe(self._handle, state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the step. An accumulation window is one step."""
        if self._throughput is not None and self._token_counter is not None:
            self._throughput.step(self._token_counter.take(state))
        if self.history is not None and self._row is not None:
            self.history.append(self._row)
            self._row = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the training logs; evaluation logs and the closing summary stay as they are."""
        if logs is None or "loss" not in logs or self._throughput is None:
            return
        rate = self._throughput.interval()
        if rate is not None:
            logs["tokens_per_second"] = rate
        if self._handle is not None:
            logs.update(grass_summary(self._handle))
            if state.is_world_process_zero:
                details = {key: value for key, value in grass_metrics(self._handle).items() if key not in logs}
                self._log_details(details, args, state, control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluation is not training time."""
        self._resume_clock()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint and remove old ones. Saving is not training time.

        Raises:
            OSError: on every rank, if a file of the checkpoint could not be put on disk on one.
        """
        if self._keeper is not None:
            self._keeper.seal(state.global_step)
            self._keeper.tidy(state.global_step, state.best_model_checkpoint)
        self._resume_clock()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the checkpoint under way, draw the plots and let go of the engine.

        Raises:
            Exception: on every rank, what went wrong with that checkpoint.
        """
        try:
            if self._handle is not None:
                self._handle.wait_for_checkpoint()
            if self._keeper is not None:
                self._keeper.tidy(state.global_step, state.best_model_checkpoint, at_end=True)
        finally:
            self._release()
        if self.history is not None and importlib.util.find_spec("matplotlib") is not None:
            try:
                self.plot_paths = save_plots(self.history, Path(str(args.output_dir)) / PLOTS_FOLDER)
                _log_to_wandb(self.plot_paths)
            except Exception as error:
                # The trained weights are not saved yet and the other ranks wait for this one to save them.
                logger.warning(f"could not draw or upload the plots ({error!r}); training itself is complete")

    def _release(self) -> None:
        """Let go of the engine: a second `train()` builds another, and both would not fit."""
        if self._keeper is not None:
            self._keeper.close()
        self._handle = self._row = self._keeper = None
        if self._token_counter is not None:
            self._token_counter.remove()
            self._token_counter = None

    def _log_details(
        self, details: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Send what does not belong into a log line to the dashboards that the Trainer reports to."""
        handler = None if self._details_failed else _calling_handler()
        for callback in handler.callbacks if handler is not None else ():
            try:
                if isinstance(callback, TensorBoardCallback):
                    callback.on_log(args, state, control, logs=details)
                elif isinstance(callback, WandbCallback):
                    _add_to_wandb_row(details)
            except Exception as error:
                self._details_failed = True
                logger.warning(
                    f"could not report the values of each layer ({error!r}); they are in {HISTORY_FILE} alone"
                )

    def _resume_clock(self) -> None:
        if self._throughput is not None:
            self._throughput.start()

    def _move_to_front(self) -> None:
        """Run before the reporting integrations, which the Trainer puts ahead of the user's callbacks."""
        handler = _calling_handler()
        if handler is None or self not in handler.callbacks:
            logger.warning("GrassCallback is not in a Trainer's callback list: callbacks before it miss its metrics")
            return
        # Safe inside the handler's loop over this list: only callbacks that were already called move back.
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)


class PreemptionCallback(TrainerCallback):
    """Save and end training in the step in which the ranks agree that one of them was asked to stop, see `Preemption`.

        preemption = grass_ds.Preemption()
        trainer = Trainer(model, args, callbacks=[GrassCallback(), PreemptionCallback(preemption)], ...)
        trainer.train(resume_from_checkpoint=grass_ds.last_checkpoint(args.output_dir))
        if preemption.reason:
            sys.exit(preemption.end())

    The checkpoint is written whatever `save_strategy` is, and published when `train()` returns. An evaluation due in the same step is left out:
    there may be no time for it. In the last step nothing is asked: training is over in any case.
    """

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the signals from the processes that load training data (`dataloader_num_workers`)."""
        loader = kwargs.get("train_dataloader")
        if loader is not None:
            loader.worker_init_fn = partial(ignore_signals, init=loader.worker_init_fn)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask, at the boundary of an optimizer step. It runs after the Trainer's own callback, which decides what else is due."""
        if state.global_step < state.max_steps and self.preemption.agreed():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The Trainer ends the epoch all the same: what is due then is saved already."""
        if self.preemption.reason:
            control.should_save = control.should_evaluate = False


def _calling_handler() -> CallbackHandler | None:
    """The handler that is running the current event.

    A callback is handed no reference to the Trainer or to its callback list, and cannot be given one and stay
    picklable, so the handler is taken from the call stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


def _find_handle(model: Any, optimizer: Any) -> Any:
    """`engine.grass` of the engine in use, or None.

    The Trainer hands its callbacks neither the engine nor the accelerator, but the engine's optimizer inside
    accelerate's wrapper, and that carries the handle too. A hand-written loop may pass the engine as `model`.
    """
    for owner in (model, optimizer):
        while owner is not None:
            handle = getattr(owner, "grass", None)
            if hasattr(handle, "active_layers"):
                return handle
            owner = getattr(owner, "optimizer", None)
    return None


def _grass_config(args: TrainingArguments) -> GrassConfig | None:
    """The enabled block in the DeepSpeed config of `--deepspeed` or of `accelerate launch`; None if there is none."""
    source = getattr(args, "hf_deepspeed_config", None)
    if source is None and is_initialized():
        source = getattr(AcceleratorState().deepspeed_plugin, "hf_ds_config", None)
    return None if source is None else parse_grass_block(source.config)


def _open_history(handle: Any, config: GrassConfig, path: Path, step: int) -> History:
    layers = handle.layers
    gamma = len(layers) if config.sampler == "full" else min(config.num_active_layers, len(layers))
    if step:
        try:
            return History.resume(path, step, layers=layers, sampler=config.sampler, num_active_layers=gamma)
        except ValueError as error:
            # Only this rank reads the file: raising here would leave the others waiting in their next collective.
            aside = path.with_name(path.name + ".old")
            logger.warning(f"{error}; it is kept as {aside.name} and a new one is started")
            os.replace(path, aside)
    return History.create(path, layers=layers, sampler=config.sampler, num_active_layers=gamma)


def _wandb() -> Any:
    """The module wandb if it has an active run, else None; it is never imported for this."""
    wandb = sys.modules.get("wandb")
    return None if wandb is None or wandb.run is None else wandb


def _add_to_wandb_row(values: dict[str, float]) -> None:
    """Put values into the row that the Trainer's wandb callback is about to log: one row per step holds everything."""
    if (wandb := _wandb()) is not None:
        wandb.log(rewrite_logs(values), commit=False)


def _log_to_wandb(paths: list[Path]) -> None:
    """Add the pictures to the active wandb run, if there is one."""
    if paths and (wandb := _wandb()) is not None:
        wandb.log({f"grass/{path.stem}": wandb.Image(os.fspath(path)) for path in paths})
