# SPDX-License-Identifier: Apache-2.0
"""Methods of others, run as their authors say, and the layers that a step trains."""

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

import grass_ds


def badam_engine(model: nn.Module, config: dict[str, Any], switch_every: int) -> Any:
    """ZeRO-3 engine around the package ``badam``'s ``BlockOptimizer``: one decoder layer at a time, in random order.

    Every rank draws the order from torch's global generator. Seed it alike on all ranks before, or they deadlock.

    Args:
        config: of stock ZeRO-3; its optimizer, torch's AdamW, becomes the one that is wrapped.
        switch_every: optimizer steps per block (K of the paper).
    """
    settings = {name: value for name, value in config["optimizer"]["params"].items() if name != "torch_adam"}
    config = {name: value for name, value in config.items() if name != "optimizer"}
    config["zero_allow_untested_optimizer"] = True
    # While this object lives, transformers says that ZeRO-3 is on. badam asks when it is imported and when it is used;
    # without it, badam silently trains as on a single device.
    zero3 = HfDeepSpeedConfig(config)
    from badam import BlockOptimizer

    optimizer = BlockOptimizer(
        base_optimizer=torch.optim.AdamW(model.parameters(), **settings),
        named_parameters_list=list(model.named_parameters()),
        switch_block_every=switch_every,
        switch_mode="random",
        ds_zero3_enabled=True,
    )
    del zero3
    engine, optimizer.ds_optimizer, *_ = grass_ds.initialize(model=model, optimizer=optimizer, config=config)
    return engine


class SignSGD(torch.optim.Optimizer):
    """Moves every weight by the learning rate against the sign of its gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """``closure`` is not called."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad.sign(), alpha=-group["lr"])


class LayerToggle:
    """LISA as its public callbacks do it: every ``period`` steps other decoder layers require gradients.

    Layers are drawn uniformly without replacement, alike on all ranks; all else keeps training. Nothing tells the
    optimizer. All parameters have to require gradients when the engine is built.
    """

    def __init__(self, engine: Any, count: int, period: int, seed: int) -> None:
        self._engine, self._count, self._period = engine, count, period
        self._layers = engine.module.get_decoder().layers
        self._generator = np.random.RandomState(seed)
        self._switches = -1
        engine.module.register_forward_pre_hook(lambda *_: self.begin_step())

    def begin_step(self) -> None:
        """Draw if the coming step is the first of a period; a second call before that step does nothing."""
        if self._engine.global_steps // self._period == self._switches:
            return
        self._switches = self._engine.global_steps // self._period
        chosen = self._generator.choice(len(self._layers), self._count, replace=False)
        for index, layer in enumerate(self._layers):
            layer.requires_grad_(index in chosen)


def active_layers(engine: Any, toggle: LayerToggle | None) -> list[int] | None:
    """The decoder layers that the coming step trains; None for methods that train all of them."""
    if engine.grass is not None:
        return list(engine.grass.active_layers)
    if toggle is not None:
        toggle.begin_step()
    layers = engine.module.get_decoder().layers
    active = [index for index, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    return active if len(active) < len(layers) else None
