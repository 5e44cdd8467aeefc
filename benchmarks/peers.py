# SPDX-License-Identifier: Apache-2.0
"""Methods that come in a package of their own, run as their authors say."""

from typing import Any

import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

import grass_ds


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


class BlockWatch:
    """Which decoder layers a step trains, and whether it changed any of their weights."""

    def __init__(self, engine: Any) -> None:
        self.layers: list[int] = [
            index
            for index, layer in enumerate(engine.module.get_decoder().layers)
            if any(parameter.requires_grad for parameter in layer.parameters())
        ]
        trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
        self._shards = [(parameter, parameter.ds_tensor.detach().clone()) for parameter in trained]

    def changed(self) -> bool:
        """Whether this rank's shards differ from what they were."""
        return any(not torch.equal(parameter.ds_tensor, before) for parameter, before in self._shards)
