# SPDX-License-Identifier: Apache-2.0
"""One step of a row: what trains in it, and the sizes that follow. Closed forms; nothing is run."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from benchmarks.methods import EVERYTHING, METHODS, Method
from benchmarks.places import OFFLOADS
from benchmarks.precision import BYTES
from grass_ds.config import GrassConfig

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A row's step that trains the layers ``active``."""

    row: Row
    active: list[int] | None

    # ---- what trains ----------------------------------------------------------------------------------------------------

    @cached_property
    def shape(self) -> dict[str, Any]:
        return self.row["shape"]

    @cached_property
    def method(self) -> Method:
        return METHODS[self.row["method"]]

    @cached_property
    def grass(self) -> GrassConfig | None:
        """The grass block, with defaults; None for other methods."""
        block = self.method.grass
        if block is None:
            return None
        offload = OFFLOADS[self.row["offload"]] if self.row["offload"] else block.get("offload", {})
        # Rows outlive options that were tried and dropped.
        settings = {name: value for name, value in self.row["grass"].items() if name in GrassConfig.model_fields}
        return GrassConfig(**{**block, **settings, "offload": {"nvme_path": ".", **offload}})

    @cached_property
    def lora(self) -> bool:
        return self.method.lora_rank is not None

    @cached_property
    def half_lora(self) -> bool:
        """The first factor of every adapter is frozen (LoRA-FA)."""
        return self.method.frozen == "lora_A"

    @cached_property
    def always(self) -> set[str]:
        """Modules outside the blocks that train. Tied embeddings are embeddings and head."""
        if self.lora or self.method.package is not None:
            return set()
        if self.grass is None or self.grass.sampler == "full":
            names = set(EVERYTHING)
        else:  # null: in a language model the final norm
            names = {"norm"} if self.grass.always_active is None else set(self.grass.always_active)
        return names | {"embed", "head"} if self.shape["tied"] and names & {"embed", "head"} else names

    @cached_property
    def layers(self) -> list[int]:
        """Layers of which something trains."""
        everywhere = self.lora or self.active is None
        return list(range(self.shape["layers"])) if everywhere else sorted(self.active or [])

    @cached_property
    def lowest(self) -> int:
        """The lowest layer that backward runs through."""
        return 0 if "embed" in self.always else min(self.layers, default=self.shape["layers"])

    def has_input_gradient(self, layer: int) -> bool:
        return layer > self.lowest or "embed" in self.always or (self.lora and self.row["checkpointing"])

    @cached_property
    def units(self) -> list[int]:
        """Elements of each part that trains: those outside the blocks first."""
        s = self.shape
        if self.lora:
            return [s["layers"] * self.adapter_numel]
        outside = {name: s[f"{name}_numel"] for name in ("head", "norm", "embed")}
        trained = [numel for name, numel in outside.items() if name in self.always and numel]
        return trained + [s["layer_numel"]] * len(self.layers)

    @cached_property
    def reduces_always(self) -> bool:
        """Whether every micro-batch is reduced: for shards, or for scores, which are means over micro-batches."""
        return self.row["stage"] > 1 or (self.grass is not None and self.grass.sampler == "grass")

    # ---- sizes ----------------------------------------------------------------------------------------------------------

    @cached_property
    def numel(self) -> int:
        """Elements of the model, adapters included."""
        s = self.shape
        outside = s["embed_numel"] + s["head_numel"] + s["norm_numel"]
        return outside + s["layers"] * s["layer_numel"] + s["lora_numel"]

    @cached_property
    def width(self) -> int:
        """Bytes of a weight, a gradient, an activation."""
        return BYTES[self.row["dtype"]]

    @cached_property
    def tokens(self) -> int:
        return self.row["micro_batch"] * self.row["sequence"]

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        s = self.shape
        hidden, inter = s["hidden"], s["intermediate"]
        query, key = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
        mlp = {"gate": (hidden, inter), "up": (hidden, inter), "down": (inter, hidden)}
        return {"q": (hidden, query), "k": (hidden, key), "v": (hidden, key), "o": (query, hidden), **mlp}

    def products(self, *names: str) -> int:
        """FLOPs of one pass through these matrices (default: all of a layer's): forward, input gradient or weight gradient."""
        return 2 * self.tokens * sum(i * o for name, (i, o) in self.linears.items() if not names or name in names)

    @cached_property
    def adapter_numel(self) -> int:
        """Elements of a layer's adapters that train."""
        inputs = 0 if self.half_lora else sum(i for i, _ in self.linears.values())
        return (self.method.lora_rank or 0) * (inputs + sum(o for _, o in self.linears.values()))

    def adapter_products(self, *, inputs: bool = True, outputs: bool = True) -> int:
        """The same through a layer's adapters: their first factors, their second ones."""
        widths = sum(inputs * i + outputs * o for i, o in self.linears.values())
        return 2 * self.tokens * (self.method.lora_rank or 0) * widths

    @cached_property
    def attention(self) -> int:
        """FLOPs of one product of attention: scores, or their use."""
        s = self.shape
        return 2 * self.tokens * self.row["sequence"] * s["heads"] * s["head_dim"]

    @cached_property
    def head_products(self) -> int:
        return 2 * self.tokens * self.shape["vocab"] * self.shape["hidden"]
