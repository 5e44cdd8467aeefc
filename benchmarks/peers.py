# SPDX-License-Identifier: Apache-2.0
"""Methods of others, run as their authors say, and what their steps really train."""

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
    """ZeRO-3 engine around the ``BlockOptimizer`` of the package ``badam``: one decoder layer at a time, in random order.

    Every rank draws the order from torch's global generator: seed it alike on all ranks beforehand, or they wait for each other
    for ever.

    Args:
        config: of stock ZeRO-3; its optimizer, torch's AdamW, becomes the one that is wrapped.
        switch_every: optimizer steps per block (K of the paper).

    Raises:
        ValueError: another stage than 3.
    """
    stage = config["zero_optimization"]["stage"]
    if stage != 3:
        raise ValueError(f"stage={stage}: the package badam shards under ZeRO-3 only; use --stage 3")
    settings = {name: value for name, value in config["optimizer"]["params"].items() if name != "torch_adam"}
    config = {name: value for name, value in config.items() if name != "optimizer"}
    config["zero_allow_untested_optimizer"] = True
    # While this object lives, transformers says that ZeRO-3 is on. badam asks when it is imported and when it is used, and
    # otherwise trains as on a single device, without a word.
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
    """LISA as its public callbacks do it: at the begin of every ``period``-th step other decoder layers require gradients.

    They are drawn uniformly without replacement, alike on all ranks; all else keeps training. Nothing tells the optimizer.
    """

    def __init__(self, engine: Any, count: int, period: int, seed: int) -> None:
        self._engine, self._count, self._period = engine, count, period
        self._layers = engine.module.get_decoder().layers
        self._generator = np.random.RandomState(seed)
        self._switches = -1

    def begin_step(self) -> None:
        """Draw if the coming step is the first of a period; does nothing when called again before that step is over."""
        if self._engine.global_steps // self._period == self._switches:
            return
        self._switches = self._engine.global_steps // self._period
        chosen = self._generator.choice(len(self._layers), self._count, replace=False)
        for index, layer in enumerate(self._layers):
            layer.requires_grad_(index in chosen)


def toggle_layers(engine: Any, count: int, period: int, seed: int) -> None:
    """Make every step of a stock engine toggle layers; all parameters have to require gradients when the engine is built."""
    engine.layer_toggle = LayerToggle(engine, count, period, seed)
    engine.module.register_forward_pre_hook(lambda *_: engine.layer_toggle.begin_step())


class Watch:
    """Which decoder layers a step trains, as our engine says; None for methods that train all of them."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def before_step(self) -> list[int] | None:
        """The layers that the coming step trains."""
        return list(self._engine.grass.active_layers) if self._engine.grass is not None else None

    def after_step(self) -> dict[str, Any]:
        """``changed``: whether the step changed weights of the layers it trains. ``moved_frozen``: number of other layers it changed.
        None where nobody doubts it."""
        return {"changed": None, "moved_frozen": None}


class BlockWatch(Watch):
    """The same of methods that say it by ``requires_grad``, and what the weights say."""

    def before_step(self) -> list[int]:
        if hasattr(self._engine, "layer_toggle"):
            self._engine.layer_toggle.begin_step()
        layers = self._engine.module.get_decoder().layers
        self._active = [
            index for index, layer in enumerate(layers) if any(weight.requires_grad for weight in layer.parameters())
        ]
        self._before = self._fingerprints()
        return self._active

    def after_step(self) -> dict[str, Any]:
        fingerprints = zip(self._before, self._fingerprints(), strict=True)
        changed = {index for index, (before, after) in enumerate(fingerprints) if before != after}
        return {
            "changed": bool(distributed.max_over_ranks(not changed.isdisjoint(self._active))),
            "moved_frozen": int(distributed.max_over_ranks(len(changed.difference(self._active)))),
        }

    def _fingerprints(self) -> list[int]:
        """A checksum of every layer, of this rank's shards where weights are sharded. Copies would count as the method's memory."""
        return [_checksum(layer) for layer in self._engine.module.get_decoder().layers]


def watch(method: str, engine: Any) -> Watch:
    """What sees the steps of the method: ``before_step`` and ``after_step`` belong around each, on all ranks."""
    peer = METHODS[method].toggles or METHODS[method].package is not None
    return BlockWatch(engine) if peer else Watch(engine)


def _checksum(layer: nn.Module) -> int:
    value = 0
    for parameter in layer.parameters():
        weight = getattr(parameter, "ds_tensor", parameter).detach()
        value = zlib.crc32(weight.contiguous().view(torch.uint8).cpu().numpy(), value)
    return value
