# SPDX-License-Identifier: Apache-2.0
"""The plan of units: sorts the parameters of the client's optimizer into units, in reduction order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from grass_ds.core.units import PartitionedUnit, ReplicatedUnit, Unit, whole_numel
from grass_ds.sampling.layers import ModelLayers

# Gradients are reduced in the order in which backward reaches the modules: the last block first.
_BEFORE_BLOCKS, _AFTER_BLOCKS = ("head", "norm", "other", "tower"), ("embed",)
_ORDER = {kind: order for order, kind in enumerate((*_BEFORE_BLOCKS, "block", *_AFTER_BLOCKS))}


@dataclass(frozen=True)
class UnitPlan:
    """What the units depend on besides the optimizer.

    Attributes:
        layers: the model's decoder blocks, and the parameters outside them by kind.
        always_active: kinds outside the blocks that always train.
        world, rank: of the data-parallel group.
        partitioned: the weights are partitioned (ZeRO-3).
    """

    layers: ModelLayers
    always_active: tuple[str, ...]
    world: int
    rank: int
    partitioned: bool = False

    def build(self, param_groups: Sequence[Mapping], param_names: Mapping[nn.Parameter, str]) -> list[Unit]:
        """The units of the optimizer's parameters, in reduction order. Allocates nothing.

        Parameters that the user froze (``requires_grad`` False) and empty parameters belong to no unit.

        Raises:
            ValueError: the optimizer holds a parameter that the model does not have, or none of a layer's.
        """
        members = self._members(param_groups, param_names)
        cls = PartitionedUnit if self.partitioned else ReplicatedUnit
        units: list[Unit] = []
        for key in sorted(members, key=_reduction_order):
            kind, layer, group = key
            name = kind if layer is None else self.layers.names[layer]
            params, names = [p for p, _ in members[key]], [n for _, n in members[key]]
            always = kind in self.always_active
            unit = cls(f"{name}/{group}", kind, layer, group, params, names, self.world, self.rank, always)
            unit.index = len(units)
            units.append(unit)
        self._check_coverage(units)
        return units

    def _members(
        self, param_groups: Sequence[Mapping], param_names: Mapping[nn.Parameter, str]
    ) -> dict[tuple[str, int | None, int], list[tuple[nn.Parameter, str]]]:
        """(kind, layer, param group) -> its trainable parameters and their names."""
        layer_of = {name: layer for layer, names in enumerate(self.layers.block_params) for name in names}
        kind_of = {name: kind for kind, names in self.layers.outside.items() for name in names}
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
                kind = "block" if name in layer_of else kind_of.get(name, "other")
                members.setdefault((kind, layer_of.get(name), group), []).append((param, name))
        return members

    def _check_coverage(self, units: Sequence[Unit]) -> None:
        """Every layer must have something to train: the sampler draws from all of them."""
        covered = {unit.layer for unit in units}
        missing = [name for layer, name in enumerate(self.layers.names) if layer not in covered]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(self.layers.names)} layers have no trainable parameter in the optimizer: "
                f"{', '.join(missing[:4])}. Leave requires_grad on in all decoder blocks and hand all parameters to "
                "the optimizer; if this model was trained by another engine before, call its engine.destroy() first."
            )


def _reduction_order(key: tuple[str, int | None, int]) -> tuple[int, int, int]:
    kind, layer, group = key
    return _ORDER[kind], -(layer or 0), group
