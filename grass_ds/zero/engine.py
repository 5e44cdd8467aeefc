# SPDX-License-Identifier: Apache-2.0
"""The DeepSpeed engine with layer-sampled ZeRO."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger

from grass_ds.config import GrassConfig, GrassConfigError, parse_grass_block
from grass_ds.core import deepspeed_compat
from grass_ds.core.agreement import check_ranks_agree, digest, raise_on_all_ranks
from grass_ds.core.unit_plan import build_units
from grass_ds.core.units import Unit, whole_numel
from grass_ds.offload.build import open_store
from grass_ds.offload.state_template import learn_template
from grass_ds.offload.store import StateStore
from grass_ds.sampling.controller import Controller
from grass_ds.sampling.importance import Signal
from grass_ds.sampling.layers import OUTSIDE_KINDS, ModelLayers
from grass_ds.zero.activation_checkpointing import fit_input_gradients
from grass_ds.zero.checkpointing import CheckpointingEngine
from grass_ds.zero.handle import GrassHandle
from grass_ds.zero.optimizer import GrassZeroOptimizer
from grass_ds.zero.outliers import OutlierMeasurement
from grass_ds.zero.response_suppression import ResponseSuppression
from grass_ds.zero.stage3 import GrassZero3Optimizer
from grass_ds.zero.stage12 import GrassZero12Optimizer


class GrassEngine(CheckpointingEngine):
    """DeepSpeedEngine whose ZeRO optimizer trains a few layers at a time. Build it with :func:`grass_ds.initialize`.

    Without an enabled ``"grass"`` block, or without an optimizer, it behaves as the stock engine.

    Args:
        grass_config: the block; None: the stock engine.
        layers: those of the model; needed with ``grass_config``.
        *args, **kwargs: of ``DeepSpeedEngine``.
    """

    def __init__(
        self, *args: Any, grass_config: GrassConfig | None = None, layers: ModelLayers | None = None, **kwargs: Any
    ):
        self._grass_config, self._layers = grass_config, layers
        self._suppression: ResponseSuppression | None = None
        deepspeed_compat.silence_renamed_collectives()
        try:
            super().__init__(*args, **kwargs)
        except BaseException:
            if self.grass is not None:  # the caller gets no engine to call destroy() on
                self.optimizer.destroy()
            self._leave_model()
            raise

    def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> Any:
        wrapper = super()._do_optimizer_sanity_check(basic_optimizer)
        # bf16 with fp32 accumulation on stage 1 would get BF16_Optimizer, which is not a ZeRO optimizer.
        if wrapper == deepspeed_compat.BFLOAT16 and self._grass_config is not None:
            return deepspeed_compat.ZERO_OPTIMIZATION
        return wrapper

    def _configure_zero_optimizer(self, optimizer: torch.optim.Optimizer | None) -> Any:
        config, layers = self._grass_config, self._layers
        if config is None and optimizer is not None and parse_grass_block(self.config) is not None:
            raise GrassConfigError(
                'the DeepSpeed config has an enabled "grass" block, but GrassEngine was built without it; build the engine '
                "with grass_ds.initialize, or with deepspeed.initialize after grass_ds.enable()"
            )
        if config is None or layers is None or optimizer is None:
            return super()._configure_zero_optimizer(optimizer)
        group = self.seq_data_parallel_group
        check_ranks_agree([digest(config.model_dump())], 'the "grass" block', group, self.device)
        always = OUTSIDE_KINDS if config.sampler == "full" else layers.resolve_always_active(config.always_active)
        stage3 = self.zero_optimization_stage() == 3
        world, rank = dist.get_world_size(group=group), dist.get_rank(group=group)
        units = build_units(layers, always, optimizer.param_groups, self.param_names, world, rank, partitioned=stage3)
        controller = config.controller(layers)
        measured = layers.names if controller.signal is Signal.OUTLIER_RATIO else ()
        outliers = OutlierMeasurement(
            self.module, measured, config.outlier_threshold, group, self.device, lambda: self.optimizer.in_forward
        )
        full_backward = self._fit_backward(layers, units)
        with ExitStack() as undo:
            with raise_on_all_ranks(group, self.device):
                store = self._open_store(config, optimizer, units, controller)
                undo.callback(store.close)
            zero: GrassZeroOptimizer
            parts = (self, config, optimizer, units, controller, store, outliers)
            if stage3:
                # Without an optimizer DeepSpeed only sets up the hooks that gather weights.
                offload = super()._configure_zero_optimizer(None)
                undo.callback(deepspeed_compat.remove_zero3_hooks, offload)
                zero = GrassZero3Optimizer(*parts, parameter_offload=offload, full_backward=full_backward)
            else:
                zero = GrassZero12Optimizer(*parts)
            undo.pop_all()
        if controller.trains_adapters:
            self._suppression = ResponseSuppression(self.module, layers.blocks, group, self.device)
        # accelerate and HF callbacks have the optimizer rather than the engine
        self.grass = zero.grass = GrassHandle(config, layers, zero, self.module)
        if self.global_rank == 0:
            self._announce(config, layers, zero)
        return zero

    def _fit_backward(self, layers: ModelLayers, units: Sequence[Unit]) -> bool:
        """Fit activation checkpointing to what trains. Whether every backward runs down to the embeddings."""
        embeddings_train = any(unit.always for unit in units if unit.kind == "embed")  # not those that the user froze
        below_train = any(unit.always and unit.kind in layers.below for unit in units)
        return fit_input_gradients(self.module, embeddings_train) or below_train

    def _open_store(
        self, config: GrassConfig, optimizer: torch.optim.Optimizer, units: list[Unit], controller: Controller
    ) -> StateStore:
        return open_store(
            config.offload,
            units,
            [learn_template(optimizer, group, self.device) for group in optimizer.param_groups],
            num_active_layers=controller.most_active,
            largest_share=controller.largest_share,
            device=self.device,
            rank=self.global_rank,
            aio=self.aio_config(),
        )

    def _announce(self, config: GrassConfig, layers: ModelLayers, optimizer: GrassZeroOptimizer) -> None:
        """One warning: how much trains at a time and at which rate, what always and what never trains, clipping."""
        units, param_groups = optimizer.units, optimizer.param_groups
        sizes = {name: whole_numel(param) for name, param in self.module.named_parameters()}
        kinds = {"part of the layers": [name for names in layers.block_params for name in names], **layers.outside}
        owned = {name for unit in units for name in unit.param_names}

        def shares(chosen: Collection[str], remark: str = "") -> list[str]:
            counts = {kind: sum(sizes[n] for n in names if n in chosen) for kind, names in kinds.items()}
            whole = sum(sizes.values())
            return [f"{kind} ({count / whole:.2%} of the weights{remark})" for kind, count in counts.items() if count]

        total, most, clip = len(layers.names), optimizer.controller.most_active, self.gradient_clipping()
        by_weight = layers.names != layers.blocks
        sampled = optimizer.controller.largest_share if by_weight else most / total
        share = sampled * sum(unit.numel for unit in units if unit.layer is not None) / sum(sizes.values())
        drawn = f"{total} matrices in {len(layers.blocks)} layers" if by_weight else f"{total} layers"
        # A scheduler may have set the rate of the first step already.
        rates = sorted({group.get("initial_lr", group["lr"]) for group in param_groups})
        on = shares({name for unit in units if unit.always for name in unit.param_names})
        off = shares({name for unit in units if not unit.ever_active for name in unit.param_names})
        off += shares(sizes.keys() - owned, ", frozen or not in the optimizer")
        default = (
            "" if "gradient_clipping" in self.config else " (the default of DeepSpeed; gradient_clipping sets it)"
        )
        clipped = f"clipped at norm {clip:g}{default}" if clip else "not clipped"
        deeper = "" if config.expansion_depth is None else f" or layer {config.expansion_depth}"
        expanded = (
            f"; inactive layers from the lowest active one{deeper} up take sign steps of {config.expansion:g} x lr"
        )
        logger.warning(
            f"grass_ds: {config.sampler}{', stratified' * config.stratified} over {drawn} at {layers.path}, "
            f"{'up to ' * by_weight}{most} active at a time ({share:.2%} of the weights), "
            f"learning rate {', '.join(f'{float(rate):g}' for rate in rates)}; "
            f"always active: {', '.join(on) or 'nothing'}; never trained: {', '.join(off) or 'nothing'}; "
            f"gradients are {clipped}{expanded if config.expansion else ''}"
        )

    def _take_model_step(self, *args: Any, **kwargs: Any) -> None:
        super()._take_model_step(*args, **kwargs)
        if self.grass is None:
            return
        if self._suppression is not None and not self.optimizer.overflow:
            self._suppression.update(self.optimizer.controller)
        self.optimizer.advance_schedule()

    def zero_grad(self) -> None:
        """As DeepSpeed's; also discard the gradients of this accumulation window, which are not on the parameters."""
        super().zero_grad()
        if self.grass is not None:
            self.optimizer.zero_grad()

    def compile(
        self,
        backend: Any = None,
        compile_kwargs: Mapping[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """As DeepSpeed's, but compile one decoder block at a time: a graph depends on which weights need a gradient.

        Blocks share at most four graphs: active or not, with or without an input gradient. Set
        ``model.config.use_cache = False``: with a cache a graph depends on the block's index.

        Args:
            backend: of ``torch.compile``; None: the accelerator's.
            compile_kwargs: its other arguments. Set ``{"dynamic": True}`` where rows differ in length: each new length
                counts towards torch's limit of recompilations otherwise.

        Raises:
            ValueError: ``compiled_autograd_enabled``, which would record the hooks that collect gradients; outliers
                are being measured, by hooks that a graph may leave out; or matrices or adapters are sampled.
        """
        backend = get_accelerator().get_compile_backend() if backend is None else backend
        kwargs = dict(compile_kwargs or {})
        if self.grass is None:
            super().compile(backend, kwargs, schedule, compiled_autograd_enabled)
            return
        if compiled_autograd_enabled:
            raise ValueError("compiled_autograd_enabled = True does not go with layer sampling: leave it False")
        if self.optimizer.outliers.active:
            raise ValueError(
                "engine.compile() while outliers are measured: hooks count the inputs of linear modules, which a "
                'compiled graph may leave out. Call it once engine.grass.phase is "train"'
            )
        if self.grass.layers != self.grass.blocks or self._suppression is not None:
            raise ValueError(
                f"engine.compile() with sampler {self.grass.config.sampler!r} would need new graphs all the time: for "
                "every set of weights that train in a block, or of adapters that are weakened. Leave it out, or sample "
                "whole layers"
            )
        if self.is_compiled:
            return
        for name in self.grass.blocks:
            self.module.get_submodule(name).compile(**{**kwargs, "backend": backend})
        deepspeed_compat.mark_compiled(self, kwargs)

    def destroy(self) -> None:
        """As DeepSpeed's; also remove the engine's hooks, which would keep the engine and its buffers alive."""
        if self.grass is not None:
            self.checkpoint_engine.close()
        super().destroy()
        if self.grass is not None:
            self._leave_model()

    def _leave_model(self) -> None:
        for name in ("module_forward_pre_hook", "module_forward_post_hook"):
            if name in vars(self):  # construction may have failed before
                getattr(self, name).remove()
        if self._suppression is not None:
            self._suppression.remove()
        self.grass = self._suppression = None
