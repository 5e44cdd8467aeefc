# SPDX-License-Identifier: Apache-2.0
"""The ZeRO optimizer wrapper that trains a few layers at a time: what all stages have in common.

[Note: A step] In ``backward``: every gradient of an active unit moves into the unit's flat buffer; a complete unit is
reduce-scattered and its buffer freed. In ``step``:
  Phase 1. One all-reduce of the squared norms of all units: global norm, overflow and layer importance at once.
  Phase 2. Per chunk of each active unit: state in, unscale and clip, the client optimizer's own step on the fp32 shard, weights out,
           state back. State came in during backward already as far as there was room (``on_reduced``).
  Phase 3. The model gets to see the updated weights, in the way of the stage (:meth:`GrassZeroOptimizer._publish`).
Inactive units appear in none of it: no gradient, no buffer, no collective, no state on the device.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.checkpoint import state as checkpoint
from grass_ds.core import deepspeed_compat
from grass_ds.core.agreement import check_ranks_agree, digest, raise_on_all_ranks
from grass_ds.core.units import Unit, whole_shape
from grass_ds.offload.store import StateStore
from grass_ds.sampling.controller import FINGERPRINT_FIELDS, Controller, Phase
from grass_ds.zero.fragments import ParamFragment
from grass_ds.zero.gradients import GradientReducer, ReduceSettings
from grass_ds.zero.norms import global_squares, layer_rms
from grass_ds.zero.stepping import StepSettings, step_unit

MAX_CONSECUTIVE_SKIPS = 20


class GrassZeroOptimizer(deepspeed_compat.ZeROOptimizer):
    """Layer-sampled ZeRO, whatever the stage.

    The client optimizer keeps its param groups as hyper-parameters, so schedulers built before or after work as ever; its
    ``params`` lists are empty but for the duration of a unit's step.

    Attributes:
        grass: the engine's :class:`~grass_ds.zero.handle.GrassHandle`, for those who are handed the optimizer alone.
        overflow: no update was applied in the last step: non-finite gradients, or a probing step. Engine, accelerate and Trainer all
            read it as "do not advance the schedule".
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        units: Sequence[Unit],
        controller: Controller,
        store: StateStore,
        reduce_settings: ReduceSettings,
        settings: StepSettings,
    ):
        super().__init__()
        self.optimizer = optimizer
        self.units = list(units)
        self.controller = controller
        self.store = store
        self.settings = settings
        self.stage = settings.stage
        self.reducer = GradientReducer(reduce_settings, on_reduced=store.prefetch)
        self.dp_process_group = reduce_settings.group
        self.dtype = units[0].dtype
        self.device = units[0].device
        self.clip_grad = settings.clip_grad
        # - What the engine and accelerate read of a ZeRO optimizer
        self.overflow = False
        self._global_grad_norm: float | None = 0.0
        self.mpu = None
        self.custom_loss_scaler = False
        self.external_loss_scale = None
        self.torch_autocast_gradscaler = None
        self.loss_scaler = deepspeed_compat.create_loss_scaler(
            self.dtype, settings.loss_scale, settings.dynamic_loss_scale, settings.dynamic_loss_args
        )
        self.dynamic_loss_scale = self.loss_scaler.dynamic
        # - Units, hooks, first active set
        self.grass: Any = None
        self._saving = False
        self.skips = 0
        self._counts = False  # whether the last step is one of the schedule's
        self._layer_rms: dict[int, float] | None = None
        layout = digest([(u.name, u.param_names, [tuple(whole_shape(p)) for p in u.params]) for u in units])
        check_ranks_agree([layout], "the layers and param groups", self.dp_process_group, self.device)
        self._check_agreement("the sampler's first state")
        self._hooks: list[Any] = []
        self._active: list[Unit] = []
        self._client_params = [group["params"] for group in optimizer.param_groups]
        try:
            for unit in units:
                unit.claim()
            for group in optimizer.param_groups:
                group["params"] = []
            for unit in units:
                self._hooks += [self._hook(unit, slot) for slot in range(len(unit.params))]
            self.activate()
        except BaseException:
            self._let_go()
            raise

    # ---- backward -------------------------------------------------------------------------------------------------------

    def _hook(self, unit: Unit, slot: int) -> Any:
        param = unit.params[slot]
        self._expose(param, ParamFragment(unit, slot, self.store, self.reducer, self.dp_process_group))

        def on_gradient(*_: Any) -> None:
            refresh = self.should_refresh_expected_hook_count()
            self.reenter_backward_if_needed()
            self.store.trace.begin("backward")
            self.reducer.arrive(unit, slot, param, self._reduces_now())
            expected = self._max_expected_hooks_seen
            if refresh:
                expected = deepspeed_compat.count_used_parameters_in_backward(
                    [p for u in self._active for p in u.params]
                )
            self.update_hook_state_and_maybe_run_epilogue(expected)

        return deepspeed_compat.register_grad_hook(param, on_gradient)

    def _reduces_now(self) -> bool:
        """Whether gradients cross ranks in this micro-step."""
        return True

    def backward_epilogue(self, **kwargs: Any) -> None:
        """End of one micro-step."""
        self.store.trace.end("backward", "backward")
        self.reducer.finish_micro_step(self._reduces_now())

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        """The engine's hook after backward from stage 2 on; :meth:`backward_epilogue`, which follows, does the work."""

    def finalize_gradient_accumulation_boundary(self) -> None:
        """The engine's hook in unmanaged accumulation: every micro-step was reduced already."""

    # ---- step -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Measure, and update the active units' weights. See [Note: A step].

        A step whose gradients were all discarded by :meth:`zero_grad` updates nothing and does not count.

        Raises:
            MissingGradientError, RankDivergenceError, RuntimeError: see :func:`grass_ds.zero.norms.global_squares`.
        """
        try:
            scale = self.loss_scale
            optional = self.settings.optional_kinds
            norms, squares = global_squares(self.reducer, self._active, self.dp_process_group, optional)
            finite = math.isfinite(sum(norms.values()) + sum(squares.values()))
            discarded = not self.reducer.micro_steps
            if not discarded:
                self._measure(squares, finite, scale)
            self._counts = finite and not discarded
            self.overflow = not self._counts or self.controller.phase is Phase.PROBE
            self._global_grad_norm = math.sqrt(sum(norms.values())) / scale if finite else float("inf")
            if not self.overflow:
                clip = max((self._global_grad_norm + 1e-6) / self.clip_grad, 1.0) if self.clip_grad > 0 else 1.0
                with self.store.trace.span("step", f"step {self.controller.step}"):
                    self._update(1.0 / (scale * clip))
        finally:  # what a failed step leaves differs between ranks, and would change what the next backward reduces
            self.reducer.clear()
        self.drop_assigned()
        self.store.end_step()

    def _measure(self, squares: dict[Unit, float], finite: bool, scale: float) -> None:
        """Adapt the loss scale, and keep the layers' gradient norms for :meth:`advance`."""
        self.loss_scaler.update_scale(not finite)
        self._note_skip(finite)
        self._layer_rms = None
        if finite and self.controller.measuring:
            steps = self.reducer.micro_steps
            window = max(steps, self.settings.accumulation_steps()) if self.reducer.discarded else steps
            self._layer_rms = layer_rms(squares, steps, window, scale)

    def _update(self, factor: float) -> None:
        """Step all active units, and share the new weights if every rank got that far."""
        with self._together():
            for unit in self._active:
                step_unit(unit, self.reducer.shards.pop(unit), factor, self.optimizer, self.store)
        self._publish(self._active)

    def check_weights(self) -> None:
        """Refuse to save weights that training does not hold.

        Raises:
            ValueError: on every rank; a parameter was given other values by ``param.data = ...``.
        """
        with self._together():
            changed = [
                unit.param_names[slot] for unit in self.units for slot in unit.replaced() if not unit.holds(slot)
            ]
            if changed:
                raise ValueError(
                    f"{len(changed)} parameters were given other weights by `param.data = ...` (first: {changed[0]}): the next step "
                    "would go on from the engine's own, and a checkpoint of both could not be resumed. Put the trained weights back "
                    "before save_checkpoint(), save the others by save_16bit_model() or model.state_dict(), or train on from them: "
                    "engine.optimizer.refresh_fp32_params()"
                )

    def flush(self) -> None:
        """Bring all state to where it rests; raise on every rank what went wrong on one."""
        with self._together():
            self.store.flush()

    def _together(self) -> AbstractContextManager[None]:
        return raise_on_all_ranks(self.dp_process_group, self.device, self.store)

    def _note_skip(self, finite: bool) -> None:
        """Non-finite gradients cost a step; without a loss scale that can adapt, they do not go away by themselves."""
        self.skips = 0 if finite else self.skips + 1
        if self.skips > MAX_CONSECUTIVE_SKIPS and not self.dynamic_loss_scale:
            raise FloatingPointError(
                f"gradients were not finite for {self.skips} steps in a row; no weight was updated in them. "
                "Lower the learning rate, clip gradients, or look for bad samples."
            )

    # ---- sampling -------------------------------------------------------------------------------------------------------

    def advance(self) -> bool:
        """Count the step just taken, and switch layers when the schedule says so. Called by the engine after every step.

        Returns:
            Whether the set of active layers changed.

        Raises:
            RankDivergenceError: ranks would train different layers.
        """
        if not self._counts:
            return False
        before = self.controller.draws
        switch = self.controller.end_step(self._layer_rms)
        if self.controller.draws != before or switch is not None:  # a draw, or probing that begins anew
            self._check_agreement("the layers to train next")
        if switch is None:
            if self.controller.draws != before:  # the same layers again: what was prepared for others may go
                self.store.plan(self._active)
            return False
        if self.settings.reset_on_switch:
            for unit in self.units:
                if unit.layer in switch.deactivated:
                    self.store.drop(unit)
        self.activate()
        return True

    def prepare_switch(self) -> None:
        """One step before a draw: let the state of the layers that it will probably choose come in."""
        upcoming = self.controller.upcoming()
        if upcoming is not None:
            self.store.prepare([unit for unit in self.units if unit.layer in upcoming])

    def activate(self) -> None:
        """Make exactly the active layers and the always-active modules trainable."""
        layers = set(self.controller.active_layers)
        for unit in self.units:
            unit.active = unit.always or unit.layer in layers
        self._show_active()
        self._active = [unit for unit in self.units if unit.active]
        training = self.controller.phase is Phase.TRAIN
        self.reducer.track(self._active, keep=training)
        self.store.plan(self._active if training else [])

    def _show_active(self) -> None:
        for unit in self.units:
            for param in unit.params:
                param.requires_grad_(unit.active)

    def _check_agreement(self, what: str) -> None:
        mine, fields = self.controller.fingerprint(), FINGERPRINT_FIELDS
        check_ranks_agree(mine, what, self.dp_process_group, self.device, fields)

    # ---- what differs between the stages --------------------------------------------------------------------------------

    def _publish(self, units: Sequence[Unit]) -> None:
        """Let the model compute with the units' shards as they are now. Called on every rank."""
        raise NotImplementedError

    def drop_assigned(self) -> None:
        """Let the model compute with the engine's weights, whatever was assigned to ``param.data``, as DeepSpeed does after a step.

        Called on every rank at the end of every step.
        """
        raise NotImplementedError

    def _expose(self, param: nn.Parameter, fragment: ParamFragment) -> None:
        """Make ``fragment`` answer for ``param`` in ``deepspeed.utils.safe_*``."""
        raise NotImplementedError

    def _conceal(self, param: nn.Parameter) -> None:
        """Undo :meth:`_expose`."""
        raise NotImplementedError

    # ---- what else the engine asks of a ZeRO optimizer ------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The client's groups: hyper-parameters only."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def loss_scale(self) -> float:
        return self.loss_scaler.cur_scale

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self.loss_scaler.cur_scale = value

    cur_scale = loss_scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard every gradient of this accumulation window: collected, reduced or measured. To be called on all ranks alike."""
        self.reducer.discard()

    @torch.no_grad()
    def refresh_fp32_params(self) -> None:
        """Take the master weights anew from the low-precision ones, also from those that were assigned (``param.data = ...``)."""
        with self._together():
            for unit in self.units:
                unit.reclaim(adopt=True)
                if unit in self.store:
                    state = self.store[unit]
                    state.master.copy_(unit.shard)
                    self.store.put(unit, state)

    _restore_from_bit16_weights = refresh_fp32_params

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Write the master weights into the low-precision ones, on all ranks."""
        with self._together():
            for unit in self.units:
                if unit in self.store:
                    unit.shard.copy_(self.store[unit].master)
        self._publish(self.units)
        self.drop_assigned()

    def state_dict(self) -> dict[str, Any]:
        # While a checkpoint is saved every rank is here, and none may go on to call it the latest if another has failed.
        with self._together() if self._saving else nullcontext():
            return checkpoint.save(self)

    def load_state_dict(
        self, state_dict_list: list[dict[str, Any]], load_optimizer_states: bool = True, **kwargs: Any
    ) -> None:
        """See :func:`grass_ds.checkpoint.state.load`."""
        with self._together():
            checkpoint.load(self, state_dict_list, load_optimizer_states, **kwargs)

    @contextmanager
    def all_trainable(self) -> Any:
        """DeepSpeed takes "does not require grad" for "frozen by the user": inside, every owned parameter requires one."""
        nested, self._saving = self._saving, True
        for unit in self.units:
            for param in unit.params:
                param.requires_grad_(True)
        try:
            yield
        finally:
            self._saving = nested
            if not nested:
                self._show_active()

    def offload_states(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError('engine.offload_states() does not know about layers; use "grass": {"offload": ...}')

    reload_states = offload_states

    def destroy(self) -> None:
        """Give model and client optimizer back: hooks removed, every owned parameter trainable, states released."""
        self._let_go()
        self.reducer.track([], keep=True)
        if get_accelerator().is_available():
            get_accelerator().synchronize()  # copies under way read host memory that is released next
        self.store.close()

    def _let_go(self) -> None:
        for hook in self._hooks:
            hook.remove()
        units, self.units, self._active, self._hooks = self.units, [], [], []
        for unit in units:
            for param in unit.params:
                self._conceal(param)
                param.requires_grad_(True)
            unit.disown()
        for group, params in zip(self.optimizer.param_groups, self._client_params, strict=False):
            group["params"] = params
        self._client_params = []
