# SPDX-License-Identifier: Apache-2.0
"""Units: the grain at which gradients are reduced and optimizer state is sharded, moved and stepped.

A unit is the part of one layer that sits in one param group of the client's optimizer; with the usual decay / no-decay split a
layer has two. Every data-parallel rank owns one shard of it: of its gradient, its optimizer state and its fp32 weights, and in
ZeRO-3 that is all that the rank has of its low-precision weights, too. What belongs to a shard is the one thing in which the ZeRO
stages differ here.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from grass_ds.sampling.layers import ModelLayers

# Shards start at multiples of this many elements: 16 bytes of bf16, which NCCL and vectorised kernels want.
SHARD_ALIGNMENT = 8
# Order of the gradient reductions, which is the order in which backward reaches the modules. Tied to the loss first.
_BEFORE_BLOCKS, _AFTER_BLOCKS = ("head", "norm", "other", "tower"), ("embed",)


@dataclass(eq=False)
class Unit(ABC):
    """One (client param group, layer).

    Attributes:
        name: ``"model.layers.3/0"``: layer (or ``embed`` / ``norm`` / ``head`` / ``other``), then the client param group.
        layer: index of the decoder block, None outside the blocks.
        group: index of the client's param group, which holds the hyper-parameters.
        params: the model's parameters; their names are ``param_names``, their elements ``sizes``.
        world, rank: of the data-parallel group.
        always: always active.
        active: trains in the coming step.
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
    sizes: list[int] = field(init=False)
    numel: int = field(init=False)

    def __post_init__(self) -> None:
        dtypes = {p.dtype for p in self.params}
        if len(dtypes) != 1:
            raise ValueError(
                f"{self.name}: parameters of several dtypes {sorted(map(str, dtypes))}; a layer must have one dtype"
            )
        self.sizes = [whole_numel(p) for p in self.params]
        self.numel = sum(self.sizes)

    # ---- where things are -----------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def shard_numel(self) -> int:
        """Elements of every rank's shard, padding included."""

    @property
    @abstractmethod
    def saved_numel(self) -> int:
        """Elements of this rank's shard that a checkpoint of this ZeRO stage holds; what follows is padding."""

    @property
    @abstractmethod
    def shard(self) -> torch.Tensor:
        """This rank's low-precision weights, [shard_numel]; writing to it changes what the model computes with."""

    @abstractmethod
    def overlap(self, slot: int) -> tuple[int, int, int]:
        """Where parameter ``slot`` meets this rank's shard: (start in the parameter, start in the shard, elements)."""

    @property
    def padded_numel(self) -> int:
        """Elements of a flat gradient: the shards of all ranks, one after the other."""
        return self.shard_numel * self.world

    @property
    def ever_active(self) -> bool:
        """Whether it can train at all: a layer, or a module that always does."""
        return self.always or self.layer is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the model computes; the shard may rest elsewhere."""
        return self.params[0].device

    # ---- weights --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def claim(self) -> None:
        """Move this rank's weights into one buffer, which the model's parameters then view. Peak: one more copy of them."""

    def replaced(self) -> list[int]:
        """Slots whose parameter no longer views that buffer, after ``param.data = ...`` or ``model.to(...)``."""
        return []

    def holds(self, slot: int) -> bool:
        """Whether the buffer holds, bit by bit, what parameter ``slot`` computes with."""
        return slot not in self.replaced()

    @abstractmethod
    def reclaim(self, adopt: bool = False) -> None:
        """Point replaced parameters into the buffer again. ``adopt``: with the values they have now, not those of the buffer."""

    @abstractmethod
    def disown(self) -> None:
        """Forget that buffer; the parameters keep it alive for as long as they view it, and no longer."""

    # ---- gradients ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def write(self, flat: torch.Tensor, slot: int, gradient: torch.Tensor, accumulate: bool) -> None:
        """Put (or add) the whole gradient of parameter ``slot`` to its place in a flat gradient [padded_numel]."""

    @abstractmethod
    def blank(self, flat: torch.Tensor, filled: Collection[int]) -> None:
        """Zero what no parameter of ``filled`` has written to in a flat gradient."""


@dataclass(eq=False)
class ReplicatedUnit(Unit):
    """ZeRO-1/2: every rank has all low-precision weights, in one flat buffer of which it owns one contiguous shard.

    Attributes:
        flat: low-precision weights, shape [padded_numel], zero-padded at the end; the parameters are views of it.
        offsets: first element of each parameter in ``flat``.
    """

    offsets: list[int] = field(init=False)
    flat: torch.Tensor = field(init=False, repr=False)
    _views: list[torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.offsets = starts(self.sizes)

    @property
    def shard_numel(self) -> int:
        grain = SHARD_ALIGNMENT * self.world
        return -(-self.numel // grain) * SHARD_ALIGNMENT

    @property
    def saved_numel(self) -> int:
        return min(max(self.numel - self.shard_start, 0), self.shard_numel)

    @property
    def shard_start(self) -> int:
        """First element of this rank's shard within ``flat``."""
        return self.shard_numel * self.rank

    @property
    def shard(self) -> torch.Tensor:
        return self.flat.narrow(0, self.shard_start, self.shard_numel)

    def overlap(self, slot: int) -> tuple[int, int, int]:
        first, last = self.offsets[slot], self.offsets[slot] + self.sizes[slot]
        begin, end = max(first, self.shard_start), min(last, self.shard_start + self.shard_numel)
        return (begin - first, begin - self.shard_start, end - begin) if begin < end else (0, 0, 0)

    def claim(self) -> None:
        shapes = [param.shape for param in self.params]
        self.flat = torch.zeros(self.padded_numel, dtype=self.dtype, device=self.device)
        self._views = [
            self.flat.narrow(0, offset, size).view(shape)
            for offset, size, shape in zip(self.offsets, self.sizes, shapes, strict=True)
        ]
        self.reclaim(adopt=True)

    def replaced(self) -> list[int]:
        pairs = zip(self.params, self._views, strict=True)
        # A moved parameter may lie at the same address of another device.
        return [
            slot for slot, (p, view) in enumerate(pairs) if p.data_ptr() != view.data_ptr() or p.device != view.device
        ]

    def reclaim(self, adopt: bool = False) -> None:
        for slot in self.replaced():
            if adopt:
                self._views[slot].copy_(self.params[slot].data)
            self.params[slot].data = self._views[slot]

    def holds(self, slot: int) -> bool:
        mine, its = self._views[slot], self.params[slot].data
        return mine.dtype == its.dtype and torch.equal(mine, its.to(mine.device))

    def disown(self) -> None:
        vars(self).pop("flat", None)
        vars(self).pop("_views", None)

    def write(self, flat: torch.Tensor, slot: int, gradient: torch.Tensor, accumulate: bool) -> None:
        _put(flat.narrow(0, self.offsets[slot], self.sizes[slot]), gradient.reshape(-1), accumulate)

    def blank(self, flat: torch.Tensor, filled: Collection[int]) -> None:
        flat[self.numel :].zero_()
        for slot, size in enumerate(self.sizes):
            if slot not in filled:
                flat.narrow(0, self.offsets[slot], size).zero_()


@dataclass(eq=False)
class PartitionedUnit(Unit):
    """ZeRO-3: every parameter is cut into ``world`` parts (the last ones padded), and a rank's shard is its parts in a row.

    A flat gradient is laid out alike, rank after rank: [world, shard_numel].

    Attributes:
        parts: elements of every rank's part of each parameter; ``offsets``: its first element in the shard.
    """

    parts: list[int] = field(init=False)
    offsets: list[int] = field(init=False)
    _shard: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts = [-(-size // self.world) for size in self.sizes]
        self.offsets = starts(self.parts)

    @property
    def shard_numel(self) -> int:
        return -(-sum(self.parts) // SHARD_ALIGNMENT) * SHARD_ALIGNMENT

    @property
    def saved_numel(self) -> int:
        return sum(self.parts)

    @property
    def shard(self) -> torch.Tensor:
        return self._shard

    def overlap(self, slot: int) -> tuple[int, int, int]:
        start, part = self.rank * self.parts[slot], self.parts[slot]
        owned = min(max(self.sizes[slot] - start, 0), part)
        return (start, self.offsets[slot], owned) if owned else (0, 0, 0)

    def claim(self) -> None:
        """Point the parameters' partitions (``ds_tensor``) into one buffer, where the largest of them is (``offload_param``)."""
        largest = max((p.ds_tensor for p in self.params), key=torch.Tensor.numel)  # type: ignore[attr-defined]
        shard = torch.zeros(self.shard_numel, dtype=self.dtype, device=largest.device)
        if get_accelerator().is_pinned(largest):
            shard = get_accelerator().pin_memory(shard)
        for slot, param in enumerate(self.params):
            partition = param.ds_tensor  # type: ignore[attr-defined]
            if partition.numel() != self.parts[slot] or partition.dtype != self.dtype:
                raise RuntimeError(
                    f"{self.param_names[slot]}: {partition.numel()} elements of {partition.dtype} on this rank, not "
                    f"{self.parts[slot]} of {self.dtype}: its weights are not partitioned over the {self.world} data-parallel ranks"
                )
            _, _, owned = self.overlap(slot)
            view = shard.narrow(0, self.offsets[slot], self.parts[slot])
            view[:owned].copy_(partition[:owned])  # the rest is DeepSpeed's padding, which it does not initialise
            partition.data = view
        self._shard = shard

    def reclaim(self, adopt: bool = False) -> None:
        """Nothing to do: weights are gathered from the partitions, so that what was put in their place goes with the next step."""

    def disown(self) -> None:
        vars(self).pop("_shard", None)

    def write(self, flat: torch.Tensor, slot: int, gradient: torch.Tensor, accumulate: bool) -> None:
        rows, values = self._rows(flat, slot), gradient.reshape(-1)
        full, rest = divmod(self.sizes[slot], self.parts[slot])
        whole = full * self.parts[slot]
        _put(rows[:full], values[:whole].view(full, -1), accumulate)
        if rest:
            _put(rows[full, :rest], values[whole:], accumulate)

    def blank(self, flat: torch.Tensor, filled: Collection[int]) -> None:
        flat.view(self.world, -1)[:, self.saved_numel :].zero_()
        for slot, size in enumerate(self.sizes):
            rows = self._rows(flat, slot)
            full, rest = divmod(size, self.parts[slot]) if slot in filled else (0, 0)
            if full < self.world:
                rows[full, rest:].zero_()
                rows[full + 1 :].zero_()

    def _rows(self, flat: torch.Tensor, slot: int) -> torch.Tensor:
        """Parameter ``slot`` in a flat gradient: [world, part]."""
        return flat.view(self.world, -1).narrow(1, self.offsets[slot], self.parts[slot])


def whole_numel(param: nn.Parameter) -> int:
    """Elements of a parameter, also of one that ZeRO-3 has partitioned."""
    return int(getattr(param, "ds_numel", param.numel()))


def whole_shape(param: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also of one that ZeRO-3 has partitioned."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each of several things in a row begins."""
    return [0, *itertools.accumulate(sizes)][:-1]


def _put(target: torch.Tensor, values: torch.Tensor, add: bool) -> None:
    if add:
        target.add_(values)
    else:
        target.copy_(values)


@dataclass(frozen=True)
class UnitPlan:
    """What the unit registry needs to know of the model and of the data-parallel group; ``partitioned``: ZeRO-3."""

    layers: ModelLayers
    always_active: tuple[str, ...]
    world: int
    rank: int
    partitioned: bool = False


def build_units(
    param_groups: Sequence[Mapping], param_names: Mapping[nn.Parameter, str], plan: UnitPlan
) -> list[Unit]:
    """Sort the optimizer's parameters into units, in reduction order; nothing is allocated.

    Parameters that the user froze (``requires_grad`` False), and those without elements, belong to no unit.

    Raises:
        ValueError: a parameter of the optimizer that the model does not have.
    """
    place = _places(plan.layers)
    members: dict[tuple[str, int | None, int], list[tuple[nn.Parameter, str]]] = {}
    for group, settings in enumerate(param_groups):
        for param in settings["params"]:
            if not param.requires_grad or whole_numel(param) == 0:
                continue
            name = param_names.get(param)
            if name is None:
                raise ValueError(
                    "the optimizer holds a parameter that is not in the model; build it from model.parameters()"
                )
            members.setdefault((*place.get(name, ("other", None)), group), []).append((param, name))
    kind_of_unit = PartitionedUnit if plan.partitioned else ReplicatedUnit
    units: list[Unit] = []
    for (kind, layer, group), owned in sorted(members.items(), key=lambda item: _reduction_order(*item[0])):
        where = kind if layer is None else plan.layers.names[layer]
        params, names = [p for p, _ in owned], [n for _, n in owned]
        always = kind in plan.always_active
        units.append(
            kind_of_unit(f"{where}/{group}", kind, layer, group, params, names, plan.world, plan.rank, always)
        )
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
