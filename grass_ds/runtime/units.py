# SPDX-License-Identifier: Apache-2.0
"""Units: the grain at which gradients are reduced and optimizer state is sharded, moved and stepped.

A unit is the part of one layer that sits in one param group of the client's optimizer; with the usual decay / no-decay split a
layer has two. Its low-precision weights lie in one flat buffer that the model's parameters view; every data-parallel rank owns
one contiguous shard of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from grass_ds.policy.layers import ModelLayers

# Shards start at multiples of this many elements: 16 bytes of bf16, which NCCL and vectorised kernels want.
SHARD_ALIGNMENT = 8
# Order of the gradient reductions, which is the order in which backward reaches the modules. Tied to the loss first.
_BEFORE_BLOCKS, _AFTER_BLOCKS = ("head", "norm", "other"), ("embed",)


@dataclass(eq=False)
class Unit:
    """One (client param group, layer).

    Attributes:
        name: ``"model.layers.3/0"``: layer (or ``embed`` / ``norm`` / ``head`` / ``other``), then the client param group.
        layer: index of the decoder block, None outside the blocks.
        group: index of the client's param group, which holds the hyper-parameters.
        params: the model's parameters, views of ``flat``; their names are ``param_names``, their first elements ``offsets``.
        flat: low-precision weights, shape [shard_numel * world], zero-padded at the end.
        shard: this rank's part of ``flat``, shape [shard_numel].
    """

    name: str
    kind: str
    layer: int | None
    group: int
    params: list[nn.Parameter]
    param_names: list[str]
    world: int
    rank: int
    always: bool
    index: int = -1
    active: bool = False
    offsets: list[int] = field(init=False)
    numel: int = field(init=False)
    flat: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        dtypes = {p.dtype for p in self.params}
        if len(dtypes) != 1:
            raise ValueError(
                f"{self.name}: parameters of several dtypes {sorted(map(str, dtypes))}; a layer must have one dtype"
            )
        sizes = [p.numel() for p in self.params]
        self.offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self.numel = sum(sizes)

    @property
    def shard_numel(self) -> int:
        """Elements of every rank's shard, padding included."""
        grain = SHARD_ALIGNMENT * self.world
        return -(-self.numel // grain) * SHARD_ALIGNMENT

    @property
    def padded_numel(self) -> int:
        """Elements of ``flat``."""
        return self.shard_numel * self.world

    @property
    def shard_start(self) -> int:
        """First element of this rank's shard within ``flat``."""
        return self.shard_numel * self.rank

    @property
    def owned_numel(self) -> int:
        """Elements of this rank's shard that are weights rather than padding."""
        return min(max(self.numel - self.shard_start, 0), self.shard_numel)

    @property
    def shard(self) -> torch.Tensor:
        return self.flat.narrow(0, self.shard_start, self.shard_numel)

    @property
    def ever_active(self) -> bool:
        """Whether it can train at all: a layer, or a module that always does."""
        return self.always or self.layer is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    def flatten(self) -> None:
        """Move the weights into ``flat`` and make the parameters views of it. Peak: one more copy of this unit."""
        self.flat = torch.zeros(self.padded_numel, dtype=self.dtype, device=self.params[0].device)
        for param, offset in zip(self.params, self.offsets, strict=True):
            view = self.flat.narrow(0, offset, param.numel()).view(param.shape)
            view.copy_(param.data)
            param.data = view

    def overlap(self, slot: int) -> tuple[int, int, int]:
        """Where parameter ``slot`` meets this rank's shard: (start in the parameter, start in the shard, elements)."""
        first, last = self.offsets[slot], self.offsets[slot] + self.params[slot].numel()
        begin, end = max(first, self.shard_start), min(last, self.shard_start + self.shard_numel)
        return (begin - first, begin - self.shard_start, end - begin) if begin < end else (0, 0, 0)


@dataclass(frozen=True)
class UnitPlan:
    """What the unit registry needs to know of the model and of the data-parallel group."""

    layers: ModelLayers
    always_active: tuple[str, ...]
    world: int
    rank: int


def build_units(
    param_groups: Sequence[Mapping], param_names: Mapping[nn.Parameter, str], plan: UnitPlan
) -> list[Unit]:
    """Sort the optimizer's parameters into units, in reduction order; nothing is allocated.

    Parameters that the user froze (``requires_grad`` False) belong to no unit.

    Raises:
        ValueError: a parameter of the optimizer that the model does not have.
    """
    place = _places(plan.layers)
    members: dict[tuple[str, int | None, int], list[tuple[nn.Parameter, str]]] = {}
    for group, settings in enumerate(param_groups):
        for param in settings["params"]:
            if not param.requires_grad:
                continue
            name = param_names.get(param)
            if name is None:
                raise ValueError(
                    "the optimizer holds a parameter that is not in the model; build it from model.parameters()"
                )
            members.setdefault((*place.get(name, ("other", None)), group), []).append((param, name))
    units = []
    for (kind, layer, group), owned in sorted(members.items(), key=lambda item: _reduction_order(*item[0])):
        where = kind if layer is None else plan.layers.names[layer]
        params, names = [p for p, _ in owned], [n for _, n in owned]
        always = kind in plan.always_active
        units.append(Unit(f"{where}/{group}", kind, layer, group, params, names, plan.world, plan.rank, always))
    for index, unit in enumerate(units):
        unit.index = index
    return units


def _places(layers: ModelLayers) -> dict[str, tuple[str, int | None]]:
    """Parameter name -> (kind, block index)."""
    place: dict[str, tuple[str, int | None]] = {}
    for index, names in enumerate(layers.block_params):
        place.update(dict.fromkeys(names, ("block", index)))
    for kind, names in layers.outside.items():
        place.update(dict.fromkeys(names, (kind, None)))
    return place


def _reduction_order(kind: str, layer: int | None, group: int) -> tuple[int, int, int]:
    if layer is not None:
        return len(_BEFORE_BLOCKS), -layer, group
    order = {**{k: i for i, k in enumerate(_BEFORE_BLOCKS)}, **{k: len(_BEFORE_BLOCKS) + 1 for k in _AFTER_BLOCKS}}
    return order[kind], 0, group
