# SPDX-License-Identifier: Apache-2.0
"""Methods of others, run as their authors say, and which layers their steps really train."""

import zlib
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

import grass_ds
from benchmarks.methods import METHODS
from launch import distributed


def badam_engine(model: nn.Module, config: dict[str, Any], switch_every: int) -> Any:
    """ZeRO-3 engine around the package ``badam``'s ``BlockOptimizer``: one decoder layer at a time, in random order.

    Every rank draws the order from torch's global generator. Seed it alike on all ranks before, or they deadlock.

    Args:
        config: of stock ZeRO-3; its optimizer, torch's AdamW, becomes the one that is wrapped.
        switch_every: optimizer steps per block (K of the paper).

    Raises:
        ValueError: another stage than 3.
    """
    stage = config["zero_optimization"]["stage"]
    if stage != 3:
        raise ValueError(f"stage={stage}: the package badam shards under ZeRO-3 only; use stage 3")
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


class Watch:
    """Which decoder layers a step trains, as our engine says; None for methods that train all of them."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def before_step(self) -> list[int] | None:
        """The layers that the coming step trains."""
        return list(self._engine.grass.active_layers) if self._engine.grass is not None else None

    def after_step(self) -> dict[str, Any]:
        """``changed``: whether the step changed weights that it trains; ``moved_frozen``: other layers that changed.

        None where it is not checked.
        """
        return {"changed": None, "moved_frozen": None}


class WeightWatch(Watch):
    """The same of methods that say it by ``requires_grad``, checked against the weights."""

    def __init__(self, engine: Any, toggle: LayerToggle | None) -> None:
        super().__init__(engine)
        self._toggle = toggle
        self._layers = engine.module.get_decoder().layers

    def before_step(self) -> list[int]:
        if self._toggle is not None:
            self._toggle.begin_step()
        self._active = [
            index for index, layer in enumerate(self._layers) if any(p.requires_grad for p in layer.parameters())
        ]
        # Checksums, as copies would count as memory of the method.
        self._before = [_checksum(layer) for layer in self._layers]
        return self._active

    def after_step(self) -> dict[str, Any]:
        after = [_checksum(layer) for layer in self._layers]
        changed = {index for index, old in enumerate(self._before) if old != after[index]}
        return {
            "changed": bool(distributed.max_over_ranks(not changed.isdisjoint(self._active))),
            "moved_frozen": int(distributed.max_over_ranks(len(changed.difference(self._active)))),
        }


def watch(method: str, engine: Any, toggle: LayerToggle | None = None) -> Watch:
    """Call ``before_step`` and ``after_step`` of the result around each step, on all ranks."""
    checked = toggle is not None or METHODS[method].package is not None
    return WeightWatch(engine, toggle) if checked else Watch(engine)


def _checksum(layer: nn.Module) -> int:
    """CRC-32 of the layer's weights; of this rank's shards where they are sharded."""
    value = 0
    for parameter in layer.parameters():
        weight = getattr(parameter, "ds_tensor", parameter).detach()
        value = zlib.crc32(weight.contiguous().view(torch.uint8).cpu().numpy(), value)
    return value
