# SPDX-License-Identifier: Apache-2.0
"""The plan of units: sorts the parameters of the client's optimizer into units, in reduction order."""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from grass_ds.core.units import PartitionedUnit, ReplicatedUnit, Unit, whole_numel
from grass_ds.sampling.layers import ModelLayers

# Gradients are reduced in the order in which backward reaches the modules: the last block first.
_ORDER = ("head", "norm", "other", "tower", "block", "vector", "embed")
_Key = tuple[str, int | None, int]  # kind, layer, param group


def build_units(
    layers: ModelLayers,
    always_active: Collection[str],
    param_groups: Sequence[Mapping],
    param_names: Mapping[nn.Parameter, str],
    world: int,
    rank: int,
    partitioned: bool = False,
) -> list[Unit]:
    """The units of the optimizer's parameters, in reduction order. Allocates nothing.

    Parameters that the user froze (``requires_grad`` False) and empty parameters belong to no unit.

    Args:
        always_active: kinds outside the blocks that always train.
        world, rank: of the data-parallel group.
        partitioned: the weights are partitioned (ZeRO-3).

    Raises:
        ValueError: the optimizer holds a parameter that the model does not have, or none of a layer's.
    """
    members = _members(layers, param_groups, param_names)
    trained = {layer for _, layer, _ in members}
    missing = [name for layer, name in enumerate(layers.names) if layer not in trained]
    if missing:  # the sampler draws from all layers
        raise ValueError(
            f"{len(missing)} of {len(layers.names)} layers have no trainable parameter in the optimizer: "
            f"{', '.join(missing[:4])}. Leave requires_grad on in all decoder blocks and hand all parameters to "
            "the optimizer; if this model was trained by another engine before, call its engine.destroy() first."
        )
    cls = PartitionedUnit if partitioned else ReplicatedUnit
    units: list[Unit] = []
    for kind, layer, group in sorted(members, key=_reduction_order):
        name = f"{kind if layer is None else layers.names[layer]}/{group}"
        names, params = map(list, zip(*members[kind, layer, group], strict=True))
        depth = None if layer is None else layers.depths[layer]
        always, index = kind in always_active, len(units)
        units.append(cls(name, kind, layer, group, params, names, world, rank, always, index, depth=depth))
    return units


def _members(
    layers: ModelLayers, param_groups: Sequence[Mapping], param_names: Mapping[nn.Parameter, str]
) -> dict[_Key, list[tuple[str, nn.Parameter]]]:
    layer_of = {name: layer for layer, names in enumerate(layers.block_params) for name in names}
    kind_of = {name: kind for kind, names in layers.outside.items() for name in names}
    members: dict[_Key, list[tuple[str, nn.Parameter]]] = {}
    for group, settings in enumerate(param_groups):
        for param in settings["params"]:
            if not param.requires_grad or whole_numel(param) == 0:
                continue
            if param not in param_names:
                raise ValueError(
                    "the optimizer holds a parameter that is not in the model; build it from model.parameters()"
                )
            name = param_names[param]
            kind = "block" if name in layer_of else kind_of.get(name, "other")
            members.setdefault((kind, layer_of.get(name), group), []).append((name, param))
    return members


def _reduction_order(key: _Key) -> tuple[int, int, int]:
    kind, layer, group = key
    return _ORDER.index(kind), -(layer or 0), group
