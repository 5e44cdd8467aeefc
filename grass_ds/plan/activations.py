# SPDX-License-Identifier: Apache-2.0
"""What a model keeps for backward, measured on the meta device: its graph is real, its tensors have no memory.

[Note: Three passes] What a block keeps depends on whether it trains and whether its input has a gradient. One pass
with all blocks trained, one with none and one without a gradient of the first block's input tell all cases. Blocks
that are alike cost alike, so of those two are measured.

[Note: Kernels] Meta tensors would take the attention of plain formulas, which keeps tokens x tokens numbers. Here
attention keeps what fused kernels keep: its three inputs, its output and a number per row. ZeRO-3 replaces linear
layers by a function that always keeps its input, and so does this. DeepSpeed leaves that function in the process,
so a ZeRO-2 model that is made there later keeps those inputs too, and is measured with them.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grass_ds.zero.activation_checkpointing import fit_input_gradients


@dataclass(frozen=True)
class BlockBytes:
    """Bytes of a decoder block.

    Attributes:
        saved: what forward leaves for backward.
        backward: the most that is alive while backward runs through it, without what lower blocks have saved and
            without gradients that have left the parameters.
    """

    saved: int
    backward: int


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, by block in module order.

    Attributes:
        trained, frozen: of a block whose input has a gradient; ``lowest``: of a trained one whose input has none.
        outside: saved outside the blocks.
        loss: the most that is alive from the last block to the loss and back, without what blocks have saved.
        below: the same below the blocks; 0 if nothing trains there.
    """

    trained: tuple[BlockBytes, ...]
    frozen: tuple[BlockBytes, ...]
    lowest: tuple[BlockBytes, ...]
    outside: int
    loss: int
    below: int


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that were made while this is on and are still alive: ``now``, and at most (``peak``).

    Attributes:
        place: of what is made next, see :meth:`by_place`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = self.place = 0
        self._sizes = {id(tensor.untyped_storage()): (0, 0) for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = (size, self.place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size).atexit = False

    def _remove(self, key: int, size: int) -> None:
        del self._sizes[key]
        self.now -= size

    def move(self, tensor: torch.Tensor) -> None:
        """It was made for the place where this is now."""
        key = id(tensor.untyped_storage())
        self._sizes[key] = (self._sizes[key][0], self.place)

    def by_place(self) -> Counter[int]:
        """Bytes alive, by the place where they were made."""
        found: Counter[int] = Counter()
        for size, place in self._sizes.values():
            found[place] += size
        return found

    def take_peak(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, self.now
        return peak


class _Kernels(TorchFunctionMode):
    """See [Note: Kernels]. Questions about values, as whether rows are packed, are answered by yes: they are not."""

    def __init__(self, keeps_inputs: bool) -> None:
        super().__init__()
        self._linear = _Linear if keeps_inputs else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            tensors = [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]
            return _Attention.apply(*tensors)
        if func is nn.functional.linear and self._linear is not None:
            return self._linear.apply(*args, *kwargs.values())
        if func is torch.Tensor.__bool__:
            return True
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, mask: Any) -> torch.Tensor:
        rows, heads, tokens, _ = query.shape
        output = query.new_empty(rows, tokens, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(
            query, key, value, mask, output, query.new_empty(rows, heads, tokens, dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return *(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3]), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Any, weight: Any, bias: Any = None) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        product = rows.matmul(weight.t())
        return product if bias is None else product + bias

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        (rows, weight), flat = ctx.saved_tensors, gradient.flatten(0, -2)
        needed = (*ctx.needs_input_grad, False)
        return (
            gradient.matmul(weight) if needed[0] else None,
            flat.t().matmul(rows.flatten(0, -2)) if needed[1] else None,
            flat.sum(0) if needed[2] else None,
        )[: len(ctx.needs_input_grad)]


class _Anchored(torch.autograd.Function):
    """The same numbers, which require a gradient because of the second tensor."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, None]:
        return None, None


class _Pass:
    """Forward and backward of one micro-batch, watched at the inputs of the blocks and of what is above them.

    Attributes:
        blocks: of each block; ``outside``, ``loss``, ``below``: see :class:`Activations`.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], keeps_inputs: bool, inputs: dict[str, Any]):
        self._live, self._last = _LiveBytes(model), len(blocks)
        self._live.place = -1
        self._peaks: dict[int, int] = {}  # while backward goes from the input of the block above to the block's own
        with ExitStack() as stack:
            for module in _outside(model, blocks):
                stack.callback(module.register_forward_pre_hook(self._above, with_kwargs=True).remove)
            for index, block in enumerate(blocks):
                stack.callback(block.register_forward_pre_hook(self._enter(index), with_kwargs=True).remove)
            for param in model.parameters():
                if param.requires_grad:
                    stack.callback(param.register_post_accumulate_grad_hook(_drop).remove)
            stack.enter_context(_Kernels(keeps_inputs))
            stack.enter_context(self._live)
            loss = model(**inputs).loss
            saved = self._live.by_place()
            if loss.requires_grad:
                loss.backward()  # function modes are off within
        self._peaks[min(self._peaks, default=self._last + 1) - 1] = self._live.take_peak()
        below = [sum(saved[place] for place in range(index)) for index in range(self._last + 1)]
        self.outside = saved[-1] + saved[self._last]
        self.loss, self.below = self._peaks.get(self._last, 0) - below[-1], self._peaks.get(-1, 0)
        self.blocks = tuple(
            BlockBytes(saved[index], self._peaks.get(index, 0) - below[index]) for index in range(self._last)
        )

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if self._live.place == index - 1:  # not when it is recomputed
                self._watch(args, kwargs)

        return hook

    def _above(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if self._live.place == self._last - 1:
            self._watch(args, kwargs)

    def _watch(self, args: Any, kwargs: Any) -> None:
        hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        self._live.place = index = self._live.place + 1
        self._live.move(hidden)

        def reached(_: torch.Tensor) -> None:
            self._peaks[index] = self._live.take_peak()

        if hidden.requires_grad:
            hidden.register_hook(reached)


def _outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The smallest modules that are not in a block."""
    inside = {id(module) for block in blocks for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inside and not [*module.children()]]


def _drop(param: torch.Tensor) -> None:
    """As the library's hook does, once it has copied the gradient."""
    param.grad = None


def recompute_blocks(model: Any, keeps_inputs: bool) -> None:
    """Turn activation checkpointing on, as the engine has it: without reentrant autograd, backward stops early."""
    recomputing = lambda: (nullcontext(), _Kernels(keeps_inputs))  # noqa: E731
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputing})
    fit_input_gradients(model, embeddings_train=False)


def measure(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    count: int,
    outside: set[str],
    micro_batch: int,
    sequence: int,
    keeps_inputs: bool,
    whole: bool,
) -> Activations:
    """Measure a model on the meta device.

    Args:
        model: with the ``blocks`` alone.
        count: blocks that the planned model has; those beyond ``blocks`` are like the last.
        outside: names of the parameters outside the blocks that train.
        keeps_inputs: linear layers keep their input whether or not they train (ZeRO-3).
        whole: backward runs through all blocks anyway.
    """
    ids = torch.zeros(micro_batch, sequence, dtype=torch.long, device="meta")
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    inside = {param for block in blocks for param in block.parameters()}

    def run(blocks_train: bool, gradient: bool) -> _Pass:
        for name, param in model.named_parameters():
            param.requires_grad_(blocks_train if param in inside else name in outside)
        if not gradient:
            return _Pass(model, blocks, keeps_inputs, inputs)
        hook = model.get_input_embeddings().register_forward_hook(_require_gradient)  # type: ignore[operator]
        try:
            return _Pass(model, blocks, keeps_inputs, inputs)
        finally:
            hook.remove()

    def extended(measured: Sequence[BlockBytes]) -> tuple[BlockBytes, ...]:
        return (*measured, *[measured[-1]] * (count - len(measured)))

    trained, frozen = run(True, True), run(False, True)
    first = trained.blocks[0] if whole else run(True, False).blocks[0]
    saved, backward = (getattr(trained.blocks[0], name) - getattr(first, name) for name in ("saved", "backward"))
    lowest = [BlockBytes(block.saved - saved, block.backward - backward) for block in trained.blocks]
    return Activations(
        extended(trained.blocks),
        extended(frozen.blocks),
        extended(lowest),
        trained.outside,
        trained.loss,
        trained.below if whole else 0,
    )


def _require_gradient(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return _Anchored.apply(output, torch.zeros((), device=output.device, requires_grad=True))
