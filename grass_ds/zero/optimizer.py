# SPDX-License-Identifier: Apache-2.0
"""The ZeRO optimizer that trains a few layers at a time: what all stages have in common.

[Note: A step] In ``backward`` every gradient of an active unit moves into the unit's flat buffer. A complete unit is
reduce-scattered, and its state is loaded if there is room. In ``step``:
  Phase 1. One all-reduce of the squared norms of all units gives the global norm, overflow and layer importance.
  Phase 2. Per chunk of each active unit: load the state, unscale and clip the gradient, let the client optimizer step
           the fp32 shard, write the weights, store the state.
  Phase 3. The model gets the updated weights, which differs between stages (:meth:`GrassZeroOptimizer._sync_weights`).
An inactive unit takes part in none of it: no gradient, no buffer, no collective, no state on the device.

[Note: Expansion] With ``grass.expansion`` the inactive layers that backward passes anyway have a gradient, too. In
phase 2 their low-precision weights move by ``expansion`` x the learning rate against its sign, without any state.
If such a layer has fp32 master weights, these stay where they are. They follow the weights when they are used next:
when the layer becomes active, in checkpoints and in ``safe_get_*`` (:func:`grass_ds.core.rounding.follow`).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.checkpoint import state as checkpoint
from grass_ds.config import GrassConfig
from grass_ds.core import deepspeed_compat
from grass_ds.core.agreement import check_ranks_agree, digest, raise_on_all_ranks
from grass_ds.core.units import Unit, whole_shape
from grass_ds.offload.store import StateStore
from grass_ds.sampling.controller import FINGERPRINT_FIELDS, Controller, Phase
from grass_ds.zero.fragments import ParamFragment
from grass_ds.zero.gradients import GradientReducer
from grass_ds.zero.outliers import OutlierMeasurement
from grass_ds.zero.step import expand_unit, global_squares, layer_rms, step_unit
from grass_ds.zero.wrapper import OptimizerWrapper


class GrassZeroOptimizer(OptimizerWrapper):
    """Layer-sampled ZeRO, whatever the stage.

    The client optimizer's param groups hold hyper-parameters, so schedulers built before or after work. Their
    ``params`` lists are empty except during a unit's step.
    """

    def __init__(
        self,
        engine: deepspeed_compat.DeepSpeedEngine,
        config: GrassConfig,
        optimizer: torch.optim.Optimizer,
        units: Sequence[Unit],
        controller: Controller,
        store: StateStore,
        outliers: OutlierMeasurement,
    ):
        super().__init__(engine, optimizer, units[0].dtype)
        self.config = config
        self.units = list(units)
        self.controller = controller
        self.store, self.outliers = store, outliers
        self.reducer = GradientReducer(engine, on_reduced=store.prefetch)
        self.dp_process_group = engine.seq_data_parallel_group
        self.grass: Any = None  # the engine's GrassHandle, for code that has the optimizer only
        self._counts_in_schedule = False  # the last step; False for a skipped or discarded one
        self._measured: dict[int, float] | None = None
        layout = digest([(u.name, u.param_names, [tuple(whole_shape(p)) for p in u.params]) for u in units])
        check_ranks_agree([layout], "the layers and param groups", self.dp_process_group, self.device)
        self._check_agreement("the sampler's first state")
        self._hooks: list[Any] = []
        self._active: list[Unit] = []
        self._expanded: list[Unit] = []
        self._client_params = [group["params"] for group in optimizer.param_groups]
        try:
            for unit in units:
                unit.flatten_weights()
            for group in optimizer.param_groups:
                group["params"] = []
            slots = {param: (unit, slot) for unit in units for slot, param in enumerate(unit.params)}
            self._attach(slots)
            self._hooks += [self._hook(param, *slot) for param, slot in slots.items()]
            self.activate()
        except BaseException:
            self._detach_from_model()
            raise

    def _fragment(self, unit: Unit, slot: int, partition: bool = False) -> ParamFragment:
        return ParamFragment(unit, slot, self.store, self.reducer, self.dp_process_group, partition)

    # ---- backward ---------------------------------------------------------------------------------------------------

    def _hook(self, param: nn.Parameter, unit: Unit, slot: int) -> Any:
        def on_gradient(*_: Any) -> None:
            refresh = self.should_refresh_expected_hook_count()
            self.reenter_backward_if_needed()
            self.store.trace.begin("backward")
            self.reducer.add_gradient(unit, slot, param, self._reduces_now())
            expected = self._max_expected_hooks_seen
            if refresh:
                params = [each for tracked in self._tracked for each in tracked.params]
                expected = deepspeed_compat.count_used_parameters_in_backward(params)
            self.update_hook_state_and_maybe_run_epilogue(expected)

        return deepspeed_compat.register_grad_hook(param, on_gradient)

    def backward_epilogue(self, **kwargs: Any) -> None:
        """End of one micro-step."""
        self.store.trace.end("backward", "backward")
        self.reducer.finish_micro_step(self._reduces_now())

    # ---- step -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Measure, and update the active units' weights. Raises as :func:`~grass_ds.zero.step.global_squares`.

        A step whose gradients were all discarded by :meth:`zero_grad` updates nothing and does not count.
        """
        try:
            scale = self.loss_scale
            norms, squares = global_squares(self.reducer, self._tracked, self.dp_process_group, self.config)
            finite = math.isfinite(sum(norms.values()) + sum(squares.values()))
            has_gradients = self.reducer.micro_steps > 0
            if has_gradients:
                self._measure(squares, finite, scale)
            self._counts_in_schedule = finite and has_gradients
            self.overflow = not self._counts_in_schedule or self.controller.phase is Phase.PROBE
            norm = math.sqrt(sum(norms[unit] for unit in self._active))
            self._global_grad_norm = norm / scale if finite else float("inf")
            if not self.overflow:
                clip = max((self._global_grad_norm + 1e-6) / self.clip_grad, 1.0) if self.clip_grad > 0 else 1.0
                with self.store.trace.span("step", f"step {self.controller.step}"):
                    self._update(1.0 / (scale * clip))
        finally:  # gradients left by a failed step differ between ranks
            self.reducer.clear()
            self.outliers.discard()
        self.undo_assignments()
        self.store.end_step()

    def _measure(self, squares: dict[Unit, float], finite: bool, scale: float) -> None:
        """Adapt the loss scale, and keep what was measured of the layers for :meth:`advance_schedule`."""
        self.update_loss_scale(finite)
        self._measured = None
        if finite and self.outliers.active:
            self._measured = self.outliers.end_step(last=self.controller.measuring)
        elif finite and self.controller.measuring:
            self._measured = layer_rms(squares, self.reducer, self.engine.gradient_accumulation_steps(), scale)

    def _update(self, factor: float) -> None:
        """Step all active units; update the model if no rank failed."""
        step = self.controller.step
        with self._raise_on_all_ranks():
            for unit in self._active:
                step_unit(unit, self.reducer.shards.pop(unit), factor, self.optimizer, self.store, step)
            for unit in self._expanded:
                self._expand(unit)
        self._sync_weights(self._tracked)

    def _expand(self, unit: Unit) -> None:
        group = self.optimizer.param_groups[unit.group]
        rate = self.config.expansion * group["lr"] * (-1 if group.get("maximize") else 1)
        # Not the sampler's seed, which a resumed run may change.
        generator = torch.Generator(unit.device).manual_seed(digest(self.controller.step, unit.name, unit.rank))
        with self.store.moving(unit):
            expand_unit(unit, self.reducer.take_signs(unit), rate, generator)

    def check_weights(self) -> None:
        """Raise ValueError on every rank if a parameter was given other values by ``param.data = ...``."""
        with self._raise_on_all_ranks():
            changed = [unit.param_names[slot] for unit in self.units for slot in unit.changed_by_assignment()]
            if changed:
                raise ValueError(
                    f"{len(changed)} parameters were given other weights by `param.data = ...` (first: {changed[0]}): the "
                    "next step would go on from the engine's own, and a checkpoint of both could not be resumed. Put the "
                    "trained weights back before save_checkpoint(), save the others by save_16bit_model() or "
                    "model.state_dict(), or train on from them: engine.optimizer.refresh_fp32_params()"
                )

    def flush(self) -> None:
        """Write all optimizer state back to its tier. Raises on every rank if one failed."""
        with self._raise_on_all_ranks():
            self.store.flush()

    def _raise_on_all_ranks(self) -> AbstractContextManager[None]:
        return raise_on_all_ranks(self.dp_process_group, self.device, self.store)

    # ---- sampling ---------------------------------------------------------------------------------------------------

    def advance_schedule(self) -> None:
        """Count the last step, and switch layers when the schedule says so. The engine calls it after every step.

        One step before a draw, load the state of the layers that it will probably choose.

        Raises:
            RankDivergenceError: ranks would train different layers.
        """
        if self._counts_in_schedule:
            self._count_step()
        upcoming = self.controller.upcoming()
        if upcoming is not None:
            self.store.prepare([unit for unit in self.units if unit.layer in upcoming])

    def _count_step(self) -> None:
        before = self.controller.draws
        switch = self.controller.end_step(self._measured)
        drawn = self.controller.draws != before
        if drawn or switch is not None:  # a draw, or probing that begins anew
            self._check_agreement("the layers to train next")
        if switch is not None:
            if self.config.state_on_switch == "reset":
                for unit in self.units:
                    if unit.layer in switch.deactivated:
                        self.store.drop(unit)
            self.activate()
        elif drawn:  # the same layers again: release what was loaded for others
            self.store.plan(self._active)

    def activate(self) -> None:
        """Make exactly the active and the expanded layers and the always-active modules trainable."""
        layers, training = set(self.controller.backward_layers), self.controller.phase is Phase.TRAIN
        for unit in self.units:
            unit.active = unit.always or unit.layer in layers
        self._active = [unit for unit in self.units if unit.active]
        lowest = self.lowest_block if training and self.config.expansion > 0 else math.inf
        for unit in self.units:
            unit.expanded = unit.depth is not None and not unit.active and unit.depth >= lowest
        self._set_requires_grad()
        self._expanded = [unit for unit in self.units if unit.expanded]
        self.reducer.track(self._tracked, keep=training)
        self.store.plan(self._active if training else [])
        self.outliers.measure(not training)

    @property
    def lowest_block(self) -> int:
        """Index of the lowest decoder block that has a gradient in the coming step."""
        depths = [self.config.expansion_depth, *(unit.depth for unit in self._active)]
        return min(depth for depth in depths if depth is not None)

    @property
    def expanded_layers(self) -> tuple[int, ...]:
        """Ascending, like the controller's ``active_layers``."""
        return tuple(sorted({unit.layer for unit in self._expanded if unit.layer is not None}))

    @property
    def _tracked(self) -> list[Unit]:
        """Units that have a gradient in the coming step."""
        return [unit for unit in self.units if unit.active or unit.expanded]

    def _set_requires_grad(self, everywhere: bool = False) -> None:
        for unit in self.units:
            for param in unit.params:
                param.requires_grad_(everywhere or unit.active or unit.expanded)

    def _check_agreement(self, what: str) -> None:
        check_ranks_agree(self.controller.fingerprint(), what, self.dp_process_group, self.device, FINGERPRINT_FIELDS)

    # ---- what differs between the stages ----------------------------------------------------------------------------

    def _reduces_now(self) -> bool:
        """Whether gradients cross ranks in this micro-step."""
        return True

    def _sync_weights(self, units: Sequence[Unit]) -> None:
        """Make the model compute with the units' updated shards. Called on every rank."""

    def undo_assignments(self) -> None:
        """Give parameters that ``param.data = ...`` replaced the engine's weights again. Called on every rank."""

    def _attach(self, slots: Mapping[nn.Parameter, tuple[Unit, int]]) -> None:
        """Make ``deepspeed.utils.safe_*`` use fragments of these parameters; undone by :meth:`_detach`."""

    def _detach(self) -> None: ...

    # ---- the engine's calls -----------------------------------------------------------------------------------------

    @property
    def round_robin_bit16_groups(self) -> list[list[nn.Parameter]]:
        """Parameters per flat group, as DeepSpeed's checkpoint code wants them: one group per unit."""
        return [unit.params for unit in self.units]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discard all gradients of this accumulation window. Call it on all ranks alike."""
        self.reducer.discard()
        self.outliers.discard()

    @torch.no_grad()
    def refresh_fp32_params(self) -> None:
        """Set the master weights from the low-precision ones, also from those assigned by ``param.data = ...``."""
        with self._raise_on_all_ranks():
            for unit in self.units:
                unit.rebind(copy_values=True)
                if unit in self.store:
                    state = self.store[unit]
                    state.master.copy_(unit.shard)
                    self.store.put(unit, state)

    _restore_from_bit16_weights = refresh_fp32_params

    @torch.no_grad()
    def update_lp_params(self) -> None:
        """Write the master weights into the low-precision ones, on all ranks."""
        with self._raise_on_all_ranks():
            for unit in self.units:
                if unit in self.store:
                    unit.shard.copy_(self.store[unit].master)
        self._sync_weights(self.units)
        self.undo_assignments()

    def state_dict(self) -> dict[str, Any]:
        """See :func:`grass_ds.checkpoint.state.save`."""
        return checkpoint.save(self)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """See :func:`grass_ds.checkpoint.state.load`."""
        with self._raise_on_all_ranks():
            checkpoint.load(self, *args, **kwargs)

    @contextmanager
    def all_trainable(self) -> Any:
        """Inside, every parameter of a unit requires a gradient: DeepSpeed takes others for frozen by the user."""
        params = [param for unit in self.units for param in unit.params]
        before = [param.requires_grad for param in params]
        self._set_requires_grad(everywhere=True)
        try:
            yield
        finally:
            for param, trains in zip(params, before, strict=True):
                param.requires_grad_(trains)

    def destroy(self) -> None:
        """Remove all hooks, make every parameter of a unit trainable again, and release all state."""
        self._detach_from_model()
        self.reducer.track([], keep=True)
        if get_accelerator().is_available():
            get_accelerator().synchronize()  # copies in flight read host memory that is released next
        self.store.close()

    def _detach_from_model(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self.outliers.measure(False)
        self._set_requires_grad(everywhere=True)
        self._detach()
        for unit in self.units:
            unit.release_buffer()
        self.units, self._active, self._expanded, self._hooks = [], [], [], []
        for group, params in zip(self.optimizer.param_groups, self._client_params, strict=False):
            group["params"] = params
        self._client_params = []
