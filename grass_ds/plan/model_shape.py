# SPDX-License-Identifier: Apache-2.0
"""A model by its config alone, on the meta device: its layers, its units and what it keeps for backward."""

import copy
import json
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grass_ds.config import GrassConfig
from grass_ds.core.unit_plan import build_units
from grass_ds.core.units import Unit
from grass_ds.plan.activations import Activations, measure, recompute_blocks
from grass_ds.sampling.layers import OUTSIDE_KINDS, ModelLayers, discover_layers
from grass_ds.validation import check_model

SHAPES = Path(__file__).parent / "shapes"
_LOCAL = "name a folder with a config.json, the file itself"


def read_config(model: str) -> Any:
    """The Hugging Face config that ``--model`` names: a folder, a config.json, a shape that ships, a name of the hub.

    Raises:
        ValueError: there is none, or it is not of a causal language model that transformers knows.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(f"--model {model}: planning needs transformers: pip install 'grass_ds[hf]'") from error

    path = Path(model).expanduser()
    shipped = SHAPES / f"{model}.json"
    file = path / "config.json" if path.is_dir() else shipped if shipped.is_file() else path
    try:
        if not file.is_file():
            return AutoConfig.from_pretrained(model)
        fields = json.loads(file.read_text())
        if not isinstance(fields, dict) or "model_type" not in fields:
            raise ValueError('it has no "model_type"')
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        names = ", ".join(sorted(shape.stem for shape in SHAPES.glob("*.json")))
        reason = " ".join(f"{error}".split())[:200]
        raise ValueError(
            f"--model {model}: no config of a model that transformers knows ({reason}). Without a network {_LOCAL}, or "
            f"one of {names}"
        ) from None


class ModelShape:
    """A causal language model without weights.

    Args:
        config: of transformers. It is not changed.
        dtype: of the weights.
        attention: ``sdpa``, a fused kernel, or ``eager``, which keeps the scores of all pairs of tokens.

    Raises:
        ValueError: transformers has no causal language model for the config, or its layers cannot be found.
    """

    def __init__(self, config: Any, dtype: torch.dtype, attention: str = "sdpa") -> None:
        self.config, self.dtype = copy.deepcopy(config), dtype
        self.config._attn_implementation = attention
        self.model = self._build()
        self.layers = discover_layers(self.model)
        self._samples: dict[tuple[bool, bool], Any] = {}
        self._layers: dict[str, ModelLayers] = {}
        self._units: dict[Any, list[Unit]] = {}
        self._activations: dict[Any, Activations] = {}

    def _build(self) -> Any:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        try:
            # Not AutoModelForCausalLM.from_config, which partitions the model under a Trainer with ZeRO-3.
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
            with torch.device("meta"):
                model = model_class(self.config)
        except (KeyError, ValueError, RuntimeError) as error:
            reason = " ".join(f"{error}".split())[:200]
            raise ValueError(
                f"--model: {type(self.config).__name__} makes no causal language model on the meta device: {reason}"
            ) from error
        for param in model.parameters():
            param.data = param.data.to(self.dtype)
        return model.train()

    @cached_property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(param.numel() for param in self.model.parameters())

    def layers_of(self, config: GrassConfig) -> ModelLayers:
        """What the sampler draws from. Raises ValueError if it cannot be used with this model."""
        key = config.model_dump_json(exclude={"num_active_layers", "offload"})
        if key not in self._layers:
            self._layers[key] = check_model(self.model, config)
        return self._layers[key]

    def always_active(self, config: GrassConfig, layers: ModelLayers) -> tuple[str, ...]:
        """Kinds of parameters outside the layers that always train."""
        return OUTSIDE_KINDS if config.sampler == "full" else layers.resolve_always_active(config.always_active)

    def units(self, layers: ModelLayers, always: Collection[str], world: int, partitioned: bool) -> list[Unit]:
        """The units of rank 0, which has the largest shards, with all parameters in one param group."""
        key = (layers.names, tuple(always), world, partitioned)
        if key not in self._units:
            names = {param: name for name, param in self.model.named_parameters()}
            self._units[key] = build_units(layers, always, [{"params": list(names)}], names, world, 0, partitioned)
        return self._units[key]

    def activations(
        self, always: Collection[str], micro_batch: int, sequence: int, checkpointing: bool, keeps_inputs: bool
    ) -> Activations:
        """Of one micro-batch, see :func:`measure`; ``always``: kinds outside the blocks that train."""
        key = (tuple(always), micro_batch, sequence, checkpointing, keeps_inputs)
        if key not in self._activations:
            self._activations[key] = self._measure(*key)
        return self._activations[key]

    def _measure(
        self, always: Collection[str], micro_batch: int, sequence: int, checkpointing: bool, keeps_inputs: bool
    ) -> Activations:
        outside = {name for kind in always for name in self.layers.outside.get(kind, ())}
        model = self._sample(checkpointing, keeps_inputs)
        blocks, whole = list(model.get_submodule(self.layers.path)), self.backward_is_whole(always)
        count = len(self.layers.blocks)
        try:
            return measure(model, blocks, count, outside, micro_batch, sequence, keeps_inputs, whole)
        except (RuntimeError, NotImplementedError) as error:
            reason = " ".join(f"{error}".split())[:200]
            raise ValueError(
                f"--model: what {type(self.config).__name__} computes depends on values (experts, for example), so that "
                f"its activations cannot be planned: {reason}"
            ) from error

    def backward_is_whole(self, always: Collection[str]) -> bool:
        """Whether backward runs through all blocks, whichever train."""
        return any(kind in self.layers.below for kind in always)

    def _sample(self, checkpointing: bool, keeps_inputs: bool) -> Any:
        """The model to measure, with two blocks if all are alike."""
        key = (checkpointing, keeps_inputs)
        if key not in self._samples:
            model = self._samples[key] = self._build()
            blocks = list(model.get_submodule(self.layers.path))
            shapes = [[(name, param.shape) for name, param in block.named_parameters()] for block in blocks]
            if len(blocks) > 2 and all(shape == shapes[0] for shape in shapes):
                parent, _, name = self.layers.path.rpartition(".")
                setattr(model.get_submodule(parent), name, nn.ModuleList(blocks[:2]))
            if checkpointing:
                recompute_blocks(model, keeps_inputs)
        return self._samples[key]
