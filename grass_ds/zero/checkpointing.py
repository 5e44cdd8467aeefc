# SPDX-License-Identifier: Apache-2.0
"""Saving and loading checkpoints: the base class of the engine."""

import filecmp
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.utils import logger

from grass_ds.checkpoint import selection
from grass_ds.checkpoint.folder import saving_tag
from grass_ds.checkpoint.part import Part
from grass_ds.checkpoint.universal import UniversalCheckpoint
from grass_ds.checkpoint.writer import CheckpointWriter
from grass_ds.core import deepspeed_compat
from grass_ds.zero.handle import GrassHandle


class CheckpointingEngine(deepspeed_compat.DeepSpeedEngine):
    """DeepSpeedEngine that saves inactive layers like active ones, completely or not at all, and checks what it loads.

    Attributes:
        grass: :class:`~grass_ds.zero.handle.GrassHandle`; None without a ``"grass"`` block: all is stock.
    """

    grass: GrassHandle | None = None

    def module_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's. ``exclude_frozen_parameters`` leaves out what the user froze, but no inactive layer."""
        with self._all_trainable():
            return super().module_state_dict(*args, **kwargs)

    def _zero3_consolidated_16bit_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`module_state_dict`, for ``save_16bit_model`` and the Trainer's final save."""
        with self._all_trainable():
            return super()._zero3_consolidated_16bit_state_dict(*args, **kwargs)

    def _all_trainable(self) -> AbstractContextManager[None]:
        return nullcontext() if self.grass is None else self.optimizer.all_trainable()

    def _configure_checkpointing(self) -> None:
        super()._configure_checkpointing()
        if self.grass is not None:
            background = bool(self.config.get("checkpoint", {}).get("async"))
            writer = CheckpointWriter(self._config, self.seq_data_parallel_group, self.device, background)
            self.checkpoint_engine = self.grass.writer = writer

    def save_checkpoint(
        self,
        save_dir: str | Path,
        tag: Any = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> Any:
        """As DeepSpeed's, with inactive layers saved like active ones. An interrupted save leaves no checkpoint.

        With ``"checkpoint": {"async": true}`` the call returns once everything is copied, and a thread writes.

        Raises:
            ValueError: parameters were given other weights by ``param.data = ...``, which training does not use.
            Exception: on every rank, an error of any rank, in this save or in the asynchronous one before.
        """
        if self.grass is None:
            return super().save_checkpoint(save_dir, tag, client_state or {}, save_latest, exclude_frozen_parameters)
        began = time.perf_counter()
        folder = Path(save_dir).absolute()  # a thread may write to it later
        tag = str(tag if tag is not None else f"global_step{self.global_steps}")
        self.optimizer.check_weights()
        self.optimizer.flush()
        writer = self.checkpoint_engine
        report = writer.start(folder, tag, save_latest, self._part())
        state = {**self._universal_info(), **(client_state or {})}
        try:
            with self._all_trainable():
                saved = super().save_checkpoint(str(folder), saving_tag(tag), state, False, exclude_frozen_parameters)
        finally:
            writer.abort_unfinished()
        report.stall_seconds = time.perf_counter() - began
        if self.global_rank == 0:
            logger.info(f"grass_ds: {report.sentence()}")
        return saved

    def _copy_recovery_script(self, save_path: Any) -> None:
        """As DeepSpeed's, unless the scripts are there already: overwriting them on a full disk would destroy them."""
        source = Path(deepspeed_compat.zero_to_fp32.__file__).parent
        names = ("zero_to_fp32.py", "zero_to_torch.py")
        if filecmp.cmpfiles(source, save_path, names, shallow=False)[0] != list(names):
            super()._copy_recovery_script(save_path)

    def _save_zero_checkpoint(self, save_path: Any, tag: Any) -> None:
        """As DeepSpeed's. Collectives follow, so an error of one rank is kept for the writer's commit() to raise."""
        try:
            super()._save_zero_checkpoint(save_path, tag)
        except Exception as error:
            if self.grass is None:
                raise
            self.checkpoint_engine.add_error(error)

    def wait_for_checkpoint(self) -> None:
        """Block until an asynchronous save is published. Call it on every rank; an error of one is raised on all."""
        if self.grass is not None:
            self.checkpoint_engine.wait()

    def _universal_info(self) -> dict[str, Any]:
        """Entry that ``ds_to_universal.py`` needs in stages 1 and 2: the model supports universal checkpoints."""
        keys = deepspeed_compat.checkpoint_keys
        version = {keys.UNIVERSAL_CHECKPOINT_VERSION_KEY: keys.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        return {keys.UNIVERSAL_CHECKPOINT_INFO: getattr(self.module, keys.UNIVERSAL_CHECKPOINT_INFO, version)}

    def _part(self) -> Part:
        group = self.seq_data_parallel_group
        rank, world = dist.get_rank(group=group), dist.get_world_size(group=group)
        layout = selection.layout(self.optimizer.units) if rank == 0 else []
        form = self.optimizer.config.offload.state_format
        return Part(rank, world, self.zero_optimization_stage(), self.global_steps, layout=layout, state_format=form)

    def load_checkpoint(
        self,
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        """As DeepSpeed's. The sampler continues from its saved state, whatever layers are active in this engine.

        Without a ``tag`` it loads the newest intact checkpoint in ``load_dir``, and warns of newer damaged ones.

        Raises:
            ValueError: on every rank, before anything is changed: the checkpoint is damaged, or of another model,
                other param groups, another number of ranks or ZeRO stage. Names the difference and the remedy.
        """
        options = (load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only)
        if self.grass is None:
            return super().load_checkpoint(load_dir, tag, *options, custom_load_fn)
        weights_alone = load_module_only or not load_optimizer_states
        stage, universal = self.zero_optimization_stage(), self.load_universal_checkpoint()
        self.wait_for_checkpoint()
        if not universal:
            tag = selection.choose(Path(load_dir), None if tag is None else str(tag), self.seq_data_parallel_group)
        if universal or tag is not None:
            selection.check_stage(load_dir, tag, stage, universal)
        if not universal and tag is not None:
            selection.check_fit(Path(load_dir, tag), self.optimizer.units, self.seq_dp_world_size, weights_alone)
        self.optimizer.undo_assignments()
        with self._all_trainable():
            result = super().load_checkpoint(load_dir, tag, *options, custom_load_fn)
            if result[0] is not None and universal:
                self._load_untrained(Path(result[0]).parent)
            elif result[0] is not None and weights_alone and stage == 3:
                self._load_weights(load_dir, tag)
        self.optimizer.flush()
        self.optimizer.activate()
        return result

    def _load_untrained(self, folder: Path) -> None:
        """Weights outside all units, of a universal checkpoint: DeepSpeed does not load the module then."""
        owned = {name for unit in self.optimizer.units for name in unit.param_names}
        rank = dist.get_rank(group=self.seq_data_parallel_group)
        self.optimizer.checkpoint_event_prologue()
        UniversalCheckpoint(folder).restore_untrained(self.module, owned, rank)
        self.optimizer.checkpoint_event_epilogue()

    def _load_checkpoint(self, *args: Any, load_optimizer_states: bool = True, **kwargs: Any) -> Any:
        """As DeepSpeed's, whose ZeRO-3 without optimizer states would load what ``latest`` names, not ``tag``."""
        load_states = load_optimizer_states or (self.grass is not None and self.zero_optimization_stage() == 3)
        return super()._load_checkpoint(*args, load_optimizer_states=load_states, **kwargs)

    def _load_weights(self, load_dir: Any, tag: Any) -> None:
        """The weights of ZeRO-3 alone: DeepSpeed loads them only together with the optimizer states."""
        weights = deepspeed_compat.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(load_dir, tag)
        self.optimizer.checkpoint_event_prologue()
        self.load_module_state_dict({"module": weights}, fetch_z3_params=True)
        self.optimizer.checkpoint_event_epilogue()
        self.optimizer.refresh_fp32_params()
