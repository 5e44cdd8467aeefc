# SPDX-License-Identifier: Apache-2.0
"""Makes the arithmetic of ZeRO-2 and ZeRO-3 the same to the last bit, on every CPU. Run inside a rank.

By themselves they round differently in two places of a model's forward and backward, and in two of what follows:

- How a matrix product rounds depends on where its weights lie in memory. Here all stages multiply by aligned copies of
them. - A norm's input has several uses, whose gradients add up in an order that depends on where DeepSpeed's hooks
stand between the modules. Here
  a norm adds up its own first, whatever the hooks.
- Every rank has other elements of a gradient, so its norms are summed in other portions. Here a run can go on with the
norms of another. - The sum of more than two numbers depends on their order, and gloo's on where an element goes. Here
more than two ranks add up in their order.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from helpers import rounding

# What global_squares() returns, by the units' names; None if it is not finite.
Squares = tuple[dict[str, float], ...] | None


class _AlignedProduct(torch.autograd.Function):
    """``linear`` with a new copy of the weights in forward and in backward: new tensors have the same alignment."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.weight = weight
        product = rows @ weight.clone().t()
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needed, flat = ctx.needs_input_grad, grad.flatten(0, -2)
        return (
            grad @ ctx.weight.clone() if needed[0] else None,
            flat.t() @ ctx.saved_tensors[0].flatten(0, -2) if needed[1] else None,
            flat.sum(0) if needed[2] else None,
        )


class _Joint(torch.autograd.Function):
    """The same numbers; in backward, what is behind it adds up before it meets anything else."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def _sum_in_order_of_ranks(output: torch.Tensor, tensor: torch.Tensor, group: Any = None) -> None:
    """A reduce-scatter that adds every element up in the same order."""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, tensor, group=group)
    output.copy_(sum(parts[1:], parts[0]).chunk(len(parts))[torch.distributed.get_rank(group)])


@contextmanager
def same_arithmetic(given: Sequence[Squares] | None = None) -> Iterator[list[Squares]]:
    """Inside, models and engines compute as above, with the ``given`` norms. Yields the measured ones, per step."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from grass_ds.zero import gradients, optimizer

    measured: list[Squares] = []

    def squares(reducer: Any, units: Any, *settings: Any) -> Any:
        found = zero_squares(reducer, units, *settings)
        finite = all(math.isfinite(value) for part in found for value in part.values())
        measured.append(tuple({unit.name: part[unit] for unit in units} for part in found) if finite else None)
        if given is None or not finite:
            return found
        return tuple({unit: part[unit.name] for unit in units} for part in given[len(measured) - 1])

    def product(self: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
        return _AlignedProduct.apply(rows, self.weight, self.bias)

    def norm(self: LlamaRMSNorm, rows: torch.Tensor) -> torch.Tensor:
        return llama_norm(self, _Joint.apply(rows))

    zero_squares, llama_norm = optimizer.global_squares, LlamaRMSNorm.forward
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(nn.Linear, "forward", product))
        patches.enter_context(mock.patch.object(LlamaRMSNorm, "forward", norm))
        patches.enter_context(mock.patch.object(optimizer, "global_squares", squares))
        if torch.distributed.get_world_size() > 2:
            patches.enter_context(mock.patch.object(gradients.dist, "reduce_scatter_tensor", _sum_in_order_of_ranks))
        yield measured


def norms_apart(two: dict[str, Any], three: dict[str, Any]) -> list[Any]:
    """Where two runs' squared norms of a unit differ by more than the rounding of their sums.

    Args:
        two, three: ``measured`` as :func:`same_arithmetic` yields it, and ``shards``: unit -> elements on a rank.
    """
    found, world = [], torch.distributed.get_world_size()
    for step, (theirs, mine) in enumerate(zip(two["measured"], three["measured"], strict=True)):
        if theirs is None or mine is None:  # overflow
            found += [] if theirs is mine else [(step, theirs, mine)]
            continue
        for one, other in zip(theirs, mine, strict=True):
            for unit, square in one.items():
                of_norms = sum(rounding.of_norm(run["shards"][unit], world, micro_steps=2) for run in (two, three))
                if not math.isclose(square, other[unit], rel_tol=2 * of_norms):
                    found.append((step, unit, square, other[unit]))
    return found
