# SPDX-License-Identifier: Apache-2.0
"""Units: gradients are reduced, and optimizer state is sharded, moved and stepped, one unit at a time.

A unit holds the parameters of one layer in one param group of the client's optimizer: with the usual split by weight
decay a layer has two. Every data-parallel rank owns one shard of a unit's gradient, optimizer state and fp32 weights,
and in ZeRO-3 of its low-precision weights. The two classes differ in which elements a shard holds.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

# Shards start at multiples of this many elements: 16 bytes of bf16, which NCCL and vectorised kernels want.
SHARD_ALIGNMENT = 8


@dataclass(eq=False)
class Unit(ABC):
    """One (client param group, layer).

    Attributes:
        name: layer (or ``embed``, ``norm``, ``head``, ``other``) and client param group: ``"model.layers.3/0"``.
        layer: index in :attr:`ModelLayers.names`, ``depth``: of its decoder block; None outside the blocks.
        group: index of the client's param group.
        params: the model's parameters; their names are ``param_names``, their elements ``sizes``.
        world, rank: of the data-parallel group.
        always: always active; ``active``: trains in the coming step; ``expanded``: inactive, but takes a sign step.
        index: position in the order of reduction.
        numel: elements of the parameters; ``shard_numel``: of every rank's shard, padding included.
        saved_numel: elements of this rank's shard that a checkpoint of this ZeRO stage holds; the rest is padding.
        shard: this rank's low-precision weights, [shard_numel]. The model's parameters share its memory.
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
    expanded: bool = False
    depth: int | None = None
    sizes: list[int] = field(init=False)
    numel: int = field(init=False)
    shard_numel: int = field(init=False)
    saved_numel: int = field(init=False)
    shard: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        dtypes = {p.dtype for p in self.params}
        if len(dtypes) != 1:
            raise ValueError(
                f"{self.name}: parameters of several dtypes {sorted(map(str, dtypes))}; a layer must have one dtype"
            )
        self.sizes = [whole_numel(p) for p in self.params]
        self.numel = sum(self.sizes)

    # ---- layout -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def overlap(self, slot: int) -> tuple[int, int, int]:
        """This rank's elements of parameter ``slot``: (start in the parameter, start in the shard, elements)."""

    @property
    def padded_numel(self) -> int:
        """Elements of a flat gradient: the shards of all ranks in rank order."""
        return self.shard_numel * self.world

    @property
    def ever_active(self) -> bool:
        """Whether the unit can train: it belongs to a layer, or to a module that is always active."""
        return self.always or self.layer is not None

    @property
    def dtype(self) -> torch.dtype:
        return self.params[0].dtype

    @property
    def device(self) -> torch.device:
        """The device that the model computes on. The shard may be on another (``offload_param``)."""
        return self.params[0].device

    # ---- weights ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def flatten_weights(self) -> None:
        """Move this rank's weights into one buffer that the parameters view. Peak memory: one more copy of them."""

    def changed_by_assignment(self) -> list[int]:
        """Slots of the parameters that ``param.data = ...`` gave values other than those of the buffer."""
        return []

    @abstractmethod
    def rebind(self, copy_values: bool = False) -> None:
        """Make assigned parameters views of the buffer again; with ``copy_values`` it gets their values first."""

    def release_buffer(self) -> None:
        """Drop the references to the buffer. The parameters keep it alive as long as they view it."""
        for name in ("flat", "shard", "_views"):
            vars(self).pop(name, None)

    # ---- gradients --------------------------------------------------------------------------------------------------

    @abstractmethod
    def write_gradient(self, flat: torch.Tensor, slot: int, gradient: torch.Tensor, accumulate: bool) -> None:
        """Copy the whole gradient of parameter ``slot`` into a flat gradient [padded_numel], or add it."""


@dataclass(eq=False)
class ReplicatedUnit(Unit):
    """ZeRO-1/2: every rank has all low-precision weights in one flat buffer, and owns one contiguous shard of it.

    Attributes:
        flat: low-precision weights, shape [padded_numel], zero-padded at the end; the parameters are views of it.
        offsets: first element of each parameter in ``flat``; ``_start``: of the shard.
    """

    offsets: list[int] = field(init=False)
    flat: torch.Tensor = field(init=False, repr=False)
    _start: int = field(init=False)
    _views: list[torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.offsets = _starts(self.sizes)
        self.shard_numel = _aligned(-(-self.numel // self.world))
        self._start = self.shard_numel * self.rank
        self.saved_numel = min(max(self.numel - self._start, 0), self.shard_numel)

    def overlap(self, slot: int) -> tuple[int, int, int]:
        first, last = self.offsets[slot], self.offsets[slot] + self.sizes[slot]
        begin, end = max(first, self._start), min(last, self._start + self.shard_numel)
        return (begin - first, begin - self._start, end - begin) if begin < end else (0, 0, 0)

    def flatten_weights(self) -> None:
        self.flat = torch.zeros(self.padded_numel, dtype=self.dtype, device=self.device)
        self.shard = self.flat.narrow(0, self._start, self.shard_numel)
        self._views = [
            self.flat.narrow(0, offset, size).view(param.shape)
            for offset, size, param in zip(self.offsets, self.sizes, self.params, strict=True)
        ]
        self.rebind(copy_values=True)

    def changed_by_assignment(self) -> list[int]:
        return [slot for slot in self._assigned_slots() if not same_values(self._views[slot], self.params[slot].data)]

    def rebind(self, copy_values: bool = False) -> None:
        for slot in self._assigned_slots():
            if copy_values:
                self._views[slot].copy_(self.params[slot].data)
            self.params[slot].data = self._views[slot]

    def _assigned_slots(self) -> list[int]:
        """Slots of the parameters that do not view the buffer, after ``param.data = ...`` or ``model.to(...)``."""
        pairs = zip(self.params, self._views, strict=True)
        return [slot for slot, (param, view) in enumerate(pairs) if not same_memory(param, view)]

    def write_gradient(self, flat: torch.Tensor, slot: int, gradient: torch.Tensor, accumulate: bool) -> None:
        _copy_or_add(flat.narrow(0, self.offsets[slot], self.sizes[slot]), gradient.reshape(-1), accumulate)


@dataclass(eq=False)
class PartitionedUnit(Unit):
    """ZeRO-3: every parameter is cut into ``world`` parts, padded at the end; a shard is a rank's parts in a row.

    A flat gradient has the same layout, rank after rank: [world, shard_numel].

    Attributes:
        parts: elements of every rank's part of each parameter; ``offsets``: its first element in the shard.
    """

    parts: list[int] = field(init=False)
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts = [-(-size // self.world) for size in self.sizes]
        self.offsets = _starts(self.parts)
        self.saved_numel = sum(self.parts)
        self.shard_numel = _aligned(self.saved_numel)

    def overlap(self, slot: int) -> tuple[int, int, int]:
        start, part = self.rank * self.parts[slot], self.parts[slot]
        owned = min(max(self.sizes[slot] - start, 0), part)
        return (start, self.offsets[slot], owned) if owned else (0, 0, 0)

    def flatten_weights(self) -> None:
        """Make the partitions (``ds_tensor``) views of one buffer on the device of the largest (``offload_param``)."""
        largest = max((p.ds_tensor for p in self.params), key=torch.Tensor.numel)  # type: ignore[attr-defined]
        shard = torch.zeros(self.shard_numel, dtype=self.dtype, device=largest.device)
        if get_accelerator().is_pinned(largest):
            shard = get_accelerator().pin_memory(shard)
        for slot, param in enumerate(self.params):
            partition = param.ds_tensor  # type: ignore[attr-defined]
            if partition.numel() != self.parts[slot] or partition.dtype != self.dtype:
                raise RuntimeError(
                    f"{self.param_names[slot]}: {partition.numel()} elements of {partition.dtype} on this rank, not "
                    f"{self.parts[slot]} of {self.dtype}: its weights are not partitioned over the {self.world} "
                    "data-parallel ranks"
                )
            _, _, owned = self.overlap(slot)
            view = shard.narrow(0, self.offsets[slot], self.parts[slot])
            view[:owned].copy_(partition[:owned])  # the rest is DeepSpeed's padding, which it does not initialise
            partition.data = view
        self.shard = shard

    def rebind(self, copy_values: bool = False) -> None:
        """Nothing to do: the next gather from the partitions replaces assigned weights."""

    def write_gradient(self, flat: torch.Tensor, slot: int, gradient: torch.Tensor, accumulate: bool) -> None:
        rows = flat.view(self.world, -1).narrow(1, self.offsets[slot], self.parts[slot])
        values = gradient.reshape(-1)
        full, rest = divmod(self.sizes[slot], self.parts[slot])
        whole = full * self.parts[slot]
        _copy_or_add(rows[:full], values[:whole].view(full, -1), accumulate)
        if rest:
            _copy_or_add(rows[full, :rest], values[whole:], accumulate)


def same_memory(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors begin at one address, which on another device is another place."""
    return left.data_ptr() == right.data_ptr() and left.device == right.device


def same_values(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have one dtype and equal elements, on any device."""
    return left.dtype == right.dtype and torch.equal(left, right.to(left.device))


def whole_numel(param: nn.Parameter) -> int:
    """Elements of a parameter, also of one that ZeRO-3 has partitioned."""
    return int(getattr(param, "ds_numel", param.numel()))


def whole_shape(param: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also of one that ZeRO-3 has partitioned."""
    return torch.Size(getattr(param, "ds_shape", param.shape))


def _starts(sizes: Sequence[int]) -> list[int]:
    """First element of each of several consecutive ranges."""
    return [0, *itertools.accumulate(sizes)][:-1]


def _aligned(numel: int) -> int:
    return -(-numel // SHARD_ALIGNMENT) * SHARD_ALIGNMENT


def _copy_or_add(target: torch.Tensor, values: torch.Tensor, add: bool) -> None:
    (target.add_ if add else target.copy_)(values)
