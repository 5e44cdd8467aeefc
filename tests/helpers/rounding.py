# SPDX-License-Identifier: Apache-2.0
"""How far two correct computations may differ on this CPU: bounds of sums, and noise measured in float64."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import nn

ROUNDOFF = 2.0**-24  # of float32: the largest relative error of one operation
# A correct gradient is off by another draw of the same roundings as the measured one: weights lie elsewhere in memory, sums are taken in
# another order. The largest of many such errors varies little; what a bug does is larger than noise by orders of magnitude.
DRAWS = 8


def of_norm(numel: int, world: int, micro_steps: int = 1) -> float:
    """Largest relative error of a norm that ranks measure in float32, of up to ``numel`` elements each in one sum.

    Squares are summed, so that nothing cancels: the relative error of the sum is at most the number of roundings on
    the way of a term times the unit roundoff. These are a product and up to numel - 1 sums, a root and a square, world
    - 1 sums over ranks and micro_steps - 1 over micro-steps. The root halves it.
    """
    return (numel + world + micro_steps + 1) / 2 * ROUNDOFF


def wide(model: nn.Module) -> nn.Module:
    """A copy that computes in float64, except norms and the loss, which Transformers computes in float32."""
    return copy.deepcopy(model).double()


def apart(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], names: Iterable[str] | None = None
) -> float:
    """Largest difference of an element, as part of its tensor's largest in ``other``."""
    return max(
        float((one[name].double() - other[name].double()).abs().max() / other[name].double().abs().max())
        for name in names or one
    )
