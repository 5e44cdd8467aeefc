# SPDX-License-Identifier: Apache-2.0
"""`PreemptionCallback`: an HF Trainer saves and stops when the job is to be preempted."""

from functools import partial
from typing import Any

from transformers import TrainerCallback
from transformers import TrainerControl as Control
from transformers import TrainerState as State
from transformers import TrainingArguments as Arguments

from grass_ds.cluster.preemption import Preemption, ignore_signals


class PreemptionCallback(TrainerCallback):
    """Save and end training in the step in which the ranks agree that one of them was asked to stop, see `Preemption`.

        preemption = grass_ds.Preemption()
        trainer = Trainer(model, args, callbacks=[GrassCallback(), PreemptionCallback(preemption)], ...)
        trainer.train(resume_from_checkpoint=grass_ds.last_checkpoint(args.output_dir))
        if preemption.reason:
            sys.exit(preemption.end())

    The checkpoint is written whatever `save_strategy` is, and published when `train()` returns. An evaluation due in
    the same step is skipped: there may be no time for it.
    """

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def on_train_begin(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Keep the signals from the processes that load training data (`dataloader_num_workers`)."""
        loader = kwargs.get("train_dataloader")
        if loader is not None:
            loader.worker_init_fn = partial(ignore_signals, init=loader.worker_init_fn)

    def on_step_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """Ask, unless training ends with this step. The Trainer's own callback has decided what else is due."""
        if state.global_step < state.max_steps and self.preemption.agreed():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Arguments, state: State, control: Control, **kwargs: Any) -> None:
        """The Trainer ends the epoch all the same, but everything is saved already."""
        if self.preemption.reason:
            control.should_save = control.should_evaluate = False
