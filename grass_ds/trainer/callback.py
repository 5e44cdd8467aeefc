# SPDX-License-Identifier: Apache-2.0
"""`GrassCallback` and `attach`: metrics, history, plots and safe checkpoints under the HF Trainer, TRL's included.

The engine samples; the callback only watches, so a run without it trains the same.
"""

import copy
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed  # noqa: F401  # before transformers: some of their releases import each other in a circle
from accelerate.state import AcceleratorState, is_initialized
from transformers import DefaultFlowCallback, TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments
from transformers.integrations import TensorBoardCallback, WandbCallback, rewrite_logs
from transformers.utils import logging

from grass_ds.config import GrassConfig, parse_grass_block
from grass_ds.trainer import retention
from grass_ds.trainer.checkpoints import seal_checkpoint
from grass_ds.trainer.history import History, HistoryRow
from grass_ds.trainer.metrics import grass_metrics, grass_summary
from grass_ds.trainer.model_card import TAG, add_to_model_card, describe_run
from grass_ds.trainer.plots import save_plots
from grass_ds.trainer.throughput import Throughput

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)

HISTORY_FILE = "grass_history.jsonl"
PLOTS_FOLDER = "plots"


def attach(trainer: "Trainer") -> "GrassCallback":
    """Add a `GrassCallback` to a Trainer before `trainer.train()`, ahead of the callbacks that report to dashboards.

    So every dashboard sees the summary in the log lines, and TensorBoard the values of each layer. The callback keeps
    `save_total_limit` itself and counts complete checkpoints only. For that, `trainer.args` becomes a copy of your
    arguments in which the limit is None. In a hyperparameter search all checkpoints then stay.

    Returns:
        The callback: the Trainer's own if it has one, else a new one.
    """
    own = trainer.pop_callback(GrassCallback)
    callback = own if isinstance(own, GrassCallback) else GrassCallback()
    callbacks = trainer.callback_handler.callbacks
    flow = [index for index, other in enumerate(callbacks) if isinstance(other, DefaultFlowCallback)]
    callbacks.insert(max(flow, default=-1) + 1, callback)  # after the one that decides what is logged
    callback._callbacks = callbacks
    limit = trainer.args.save_total_limit
    if limit and not trainer.args.save_only_model and _grass_config(trainer.args) is not None:
        callback._limit = limit
        without_limit = copy.copy(trainer.args)
        without_limit.save_total_limit = None
        trainer.args = without_limit
    return callback


class GrassCallback(TrainerCallback):
    """Report a GRASS run through the HF Trainer, and make its checkpoints safe. Added by `attach` or `callbacks=`.

    - Every training log gets the few values of `grass_summary` and `tokens_per_second`. wandb gets all values of
      `grass_metrics` in the row of the same step, TensorBoard after `attach`. A failure there is logged once.
    - `<output_dir>/grass_history.jsonl` gets one row per step. Resuming from a checkpoint drops the rows after it; a
      file that cannot be continued is renamed to `grass_history.jsonl.old`.
    - Every checkpoint is sealed with `grass_trainer.json`, by which `grass_ds.last_checkpoint` tells a complete one
      from what a killed job left. Not so with `save_only_model` and in a hyperparameter search.
    - Training ends when the last checkpoint is published. Then `<output_dir>/plots/*.png` are drawn, and
      `<output_dir>/README.md`, the model card, gets a section about the run.

    Files are written on global rank 0. Without DeepSpeed or without a `"grass"` block only `tokens_per_second` is
    reported, so one script serves every method that is to be compared. A pickled or copied callback is as good as new,
    and not attached.

    Attributes:
        history: the steps so far on global rank 0 of a GRASS run, else None.
        plot_paths: the PNG files, once drawn.
    """

    def __init__(self) -> None:
        self.history: History | None = None
        self.plot_paths: list[Path] = []
        self._callbacks: list[TrainerCallback] = []  # of the Trainer, once attached
        self._limit: int | None = None  # complete checkpoints to keep, once attached
        self._grass: Any = None  # engine.grass
        self._config: GrassConfig | None = None  # where there is a history
        self._seals = False
        self._dashboards_failed = False
        self._row: HistoryRow | None = None
        self._summary: dict[str, float | str] | None = None  # of the step that just ended
        self._throughput: Throughput | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(GrassCallback())

    @property
    def tokens_per_second(self) -> float | None:
        """Average over the run so far, all ranks together; None before the first step."""
        return None if self._throughput is None else self._throughput.average

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Find the engine and open the history. The Trainer has built the engine and loaded the checkpoint by now.

        Raises:
            RuntimeError: the config asks for GRASS and the engine would ignore it and train every layer.
            ValueError: `save_total_limit` could leave a killed job without a checkpoint.
        """
        self._release()
        self._grass = _find_grass(kwargs.get("model"), kwargs.get("optimizer"))
        config = _grass_config(args)
        if config is not None and self._grass is None:
            raise RuntimeError(
                'the DeepSpeed config has an enabled "grass" block, but the engine in use is not a GrassEngine and '
                "would train every layer at every step; call grass_ds.enable() before building the Trainer, or remove "
                "the block"
            )
        self._seals = self._grass is not None and not args.save_only_model and not state.is_hyper_param_search
        if self._seals and args.save_total_limit:
            retention.prepare_for_trainer(args, state.global_step)
        self._throughput = Throughput(kwargs["model"], state, args)
        self.history, self.plot_paths, self._config = None, [], None
        if config is not None and hasattr(model := kwargs["model"], "add_model_tags"):
            model.add_model_tags([TAG])  # for the cards that the Trainer writes
        if config is not None and state.is_world_process_zero:
            self._config = config
            self.history = _open_history(self._grass, config, Path(str(args.output_dir)), state.global_step)
            if not self._callbacks and (others := set(args.report_to or ()) - {"wandb"}):
                logger.warning(
                    f"{', '.join(sorted(others))} will not show the metrics of GrassCallback: after building the "
                    "Trainer, call grass_ds.attach(trainer)"
                )

    def on_step_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Read what this step trains: at its end the engine draws the next layers."""
        self._summary = None
        if self.tokens_per_second is None:
            self._restart_clock()  # a resumed run may have spent minutes on skipping data
        if self.history is not None:
            self._row = HistoryRow.observe(self._grass, state.global_step + 1)

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Add the step to the history. All micro-batches of an accumulation are one step."""
        if self._throughput is not None:
            self._throughput.step(state)
        if self.history is not None and self._row is not None:
            self.history.append(self._row)
        self._log_to_wandb(args, state, control)

    def on_epoch_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Log to wandb if the Trainer logs at the end of epochs."""
        self._log_to_wandb(args, state, control)

    def on_log(
        self, args: Arguments, state: State, control: Control, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add to the training logs; evaluation logs and the closing summary stay as they are."""
        if logs is None or "loss" not in logs:
            return
        logs.update(self._summarize())
        if self._callbacks and self._grass is not None and state.is_world_process_zero:
            values = {key: value for key, value in grass_metrics(self._grass).items() if key not in logs}
            for board in self._callbacks:
                if isinstance(board, TensorBoardCallback):
                    self._try(board.on_log, args, state, control, values)

    def on_evaluate(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Evaluation is not training time."""
        self._restart_clock()

    def on_save(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Seal the checkpoint and remove old ones. Saving is not training time."""
        if self._seals:
            seal_checkpoint(args, state.global_step)
            retention.remove_surplus(args, self._limit, state.global_step, state.best_model_checkpoint)
        self._restart_clock()

    def on_train_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Wait until the last checkpoint is published, which raises its errors; release the engine, draw the plots."""
        try:
            if self._grass is not None:
                self._grass.wait_for_checkpoint()
            if self._seals:
                best = state.best_model_checkpoint
                retention.remove_surplus(args, self._limit, state.global_step, best, at_end=True)
        finally:
            self._release()
        if self.history is not None:
            try:
                self.plot_paths = save_plots(self.history, Path(str(args.output_dir)) / PLOTS_FOLDER)
                if self.plot_paths and (wandb := _active_wandb()) is not None:
                    wandb.log({f"grass/{path.stem}": wandb.Image(os.fspath(path)) for path in self.plot_paths})
            except Exception as error:
                # The trained weights are not saved yet and the other ranks wait for this one to save them.
                logger.warning(f"could not draw or upload the plots ({error!r}); training itself is complete")
            try:
                self.add_to_model_card()
            except Exception as error:
                logger.warning(f"could not write the model card ({error!r}); training itself is complete")

    def add_to_model_card(self, folder: str | os.PathLike[str] | None = None) -> None:
        """Add a section about the run to the model card in `folder`; None: in `output_dir`.

        It is called at the end of training. Call it for another folder, or after `trainer.create_model_card()`, which
        writes `README.md` anew. Does nothing on ranks other than 0 and before the first step.

        Raises:
            ValueError, OSError: `README.md` there is no model card, or cannot be written.
        """
        if self.history is not None and self.history.rows and self._config is not None:
            to = self.history.path.parent if folder is None else Path(folder)
            add_to_model_card(to, describe_run(self.history, self._config))

    def _release(self) -> None:
        """Drop the engine: a second `train()` builds another, and both would not fit."""
        self._grass = self._row = self._summary = None
        if self._throughput is not None:
            self._throughput.close()

    def _restart_clock(self) -> None:
        if self._throughput is not None:
            self._throughput.start()

    def _summarize(self) -> dict[str, float | str]:
        """The values for the log line of this step; computed once, since the rate is that since the line before."""
        if self._summary is None:
            rate = None if self._throughput is None else self._throughput.interval()
            self._summary = {} if rate is None else {"tokens_per_second": rate}
            if self._grass is not None:
                self._summary |= grass_summary(self._grass)
        return self._summary

    def _log_to_wandb(self, args: Arguments, state: State, control: Control) -> None:
        """Add to the row that the Trainer's wandb callback logs next, wherever that callback is in the order."""
        logs_to_wandb = "wandb" in (args.report_to or ()) or any(isinstance(c, WandbCallback) for c in self._callbacks)
        if control.should_log and state.is_world_process_zero and logs_to_wandb:
            values = {} if self._grass is None else grass_metrics(self._grass)
            self._try(add_to_wandb_row, {**values, **self._summarize()})

    def _try(self, log: Callable[..., None], *values: Any) -> None:
        """Call `log`, until it fails once."""
        if self._dashboards_failed:
            return
        try:
            log(*values)
        except Exception as error:
            self._dashboards_failed = True
            logger.warning(f"could not log the values of each layer ({error!r}); they are in {HISTORY_FILE} alone")


def add_to_wandb_row(values: Mapping[str, float | str]) -> None:
    """Add values to the row that the Trainer's wandb callback logs next, so that one row per step holds everything."""
    if (wandb := _active_wandb()) is not None:
        wandb.log(rewrite_logs(dict(values)), commit=False)


def _active_wandb() -> Any:
    """The module wandb if this process has an active run, else None; never imported for this."""
    wandb = sys.modules.get("wandb")
    return None if wandb is None or wandb.run is None else wandb


def _find_grass(model: Any, optimizer: Any) -> Any:
    """`engine.grass` of the engine in use, or None.

    The Trainer hands its callbacks neither the engine nor the accelerator, but the engine's optimizer inside
    accelerate's wrapper, which has the attribute too. A hand-written loop may pass the engine as `model`.
    """
    for owner in (model, optimizer):
        while owner is not None:
            grass = getattr(owner, "grass", None)
            if hasattr(grass, "active_layers"):
                return grass
            owner = getattr(owner, "optimizer", None)
    return None


def _grass_config(args: Arguments) -> GrassConfig | None:
    """The enabled block in the DeepSpeed config of `--deepspeed` or of `accelerate launch`; None if there is none."""
    source = getattr(args, "hf_deepspeed_config", None)
    if source is None and is_initialized():
        source = getattr(AcceleratorState().deepspeed_plugin, "hf_ds_config", None)
    return None if source is None else parse_grass_block(source.config)


def _open_history(grass: Any, config: GrassConfig, folder: Path, step: int) -> History:
    layers, path = grass.layers, folder / HISTORY_FILE
    gamma = grass.most_active
    run = {"layers": layers, "sampler": config.sampler, "num_active_layers": gamma}
    try:
        return History.start(path, step, **run)
    except ValueError as error:
        # Only this rank reads the file: raising here would leave the others waiting in their next collective.
        aside = path.with_name(path.name + ".old")
        logger.warning(f"{error}; it is kept as {aside.name} and a new one is started")
        os.replace(path, aside)
        return History.start(path, **run)
