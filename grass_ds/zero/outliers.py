# SPDX-License-Identifier: Apache-2.0
"""Outlier ratios of the layers, for the sampler ``outlier`` (OWS, the sampling of OwLore, arXiv 2405.18380).

A_ij = |W_ij| * ||X_j||_2 (Wanda) for every weight of a layer's linear modules, where X_j is input feature j over all
tokens. D_l is the percentage of the A_ij of layer l that are above M times their mean; the mean is over all matrices
of the layer (``check_outlier_mean`` of OWL, github.com/luuyin/OWL, to which the paper refers).

[Note: What counts] X are the inputs of all tokens, padding included, in the micro-batches of the probing steps on all
ranks. An input counts in a forward pass of the engine with gradients enabled, and only until its backward begins. So
evaluations do not count, and neither does recomputation by activation checkpointing. It may end before the last module
of a block and leave out whole blocks, so that modules would be counted unequally. A step that does not count in the
schedule (overflow, ``zero_grad()``) leaves no trace.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import logger
from torch import nn

from grass_ds.config import GrassConfigError
from grass_ds.core.deepspeed_compat import GatheredParameters, ZeroParamStatus
from grass_ds.core.durable_files import listed
from grass_ds.core.units import whole_numel, whole_shape


def linear_modules(model: nn.Module, layers: Sequence[str]) -> list[dict[str, nn.Module]]:
    """Per layer its ``nn.Linear`` and ``Conv1D`` (transformers, as in GPT-2) by name in the model.

    Args:
        layers: names of the decoder blocks in ``model``.

    Raises:
        GrassConfigError: these modules hold less than half of a layer's weights (experts fused in one 3-D parameter),
            or the model is compiled.
    """
    if any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
        raise GrassConfigError(
            'grass.sampler = "outlier" counts the inputs of linear modules by hooks, which a compiled graph may leave '
            'out: pass the model without torch.compile, and call engine.compile() once engine.grass.phase is "train"'
        )
    found = []
    for layer in layers:
        block = model.get_submodule(layer)
        modules = {f"{layer}.{name}": module for name, module in block.named_modules() if _is_linear(module)}
        held, whole = (
            sum(map(whole_numel, params))
            for params in ({_weight(m) for m in modules.values()}, set(block.parameters()))
        )
        if 2 * held < whole:
            raise GrassConfigError(
                f'grass.sampler = "outlier" needs the weights of a layer in linear modules (nn.Linear, Conv1D): in {layer} '
                f"they hold {held} of {whole} weights. Experts that are fused in one 3-D parameter cannot be measured; "
                'use "sampler": "grass" or "sampler": "uniform"'
            )
        found.append(modules)
    return found


def _is_linear(module: nn.Module) -> bool:
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__}
    return isinstance(module, nn.Linear) or "transformers.Conv1D" in names  # this room knows no transformers


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _in_features(module: nn.Module) -> int:
    return whole_shape(_weight(module))[1 if isinstance(module, nn.Linear) else 0]


def outlier_ratio(matrices: Sequence[tuple[torch.Tensor, torch.Tensor]], threshold: float) -> float:
    """D_l of a layer in percent; nan if a weight or a norm is not finite. Computed in float32, one matrix at a time.

    Args:
        matrices: of every linear module the weight [out, in], any float dtype, and the squared norms of its input
            features [in], float32.
        threshold: M > 0.
    """
    numel = sum(weight.numel() for weight, _ in matrices)
    mean = math.fsum(float(_wanda(*matrix).sum()) for matrix in matrices) / numel
    if not math.isfinite(mean):
        return math.nan
    return sum(int((_wanda(*matrix) > threshold * mean).sum()) for matrix in matrices) / numel * 100


def _wanda(weight: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """A_ij [out, in], float32."""
    return weight.detach().abs().to(torch.float32).mul_(squares.sqrt())


class OutlierMeasurement:
    """Sums squared input norms while a probing lasts, and computes the outlier ratios at its end.

    Args:
        model: what the engine trains.
        layers: names of its decoder blocks; none: nothing is ever measured.
        threshold: M.
        group: the data-parallel ranks.
        device: of the inputs.
        counts: whether the forward pass under way counts, see [Note: What counts].

    Raises:
        GrassConfigError: as :func:`linear_modules`.

    Attributes:
        active: inputs are being counted.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        threshold: float,
        group: Any,
        device: torch.device,
        counts: Callable[[], bool],
    ):
        self._layers = linear_modules(model, layers) if layers else []
        self._threshold, self._group, self._device, self._counts = threshold, group, device, counts
        self._spans: dict[str, tuple[int, int]] = {}  # of each module in the two vectors below
        self._numel = 0
        for name, module in self._modules():
            self._spans[name] = (self._numel, _in_features(module))
            self._numel += _in_features(module)
        # Squared norms per input feature of every module, [sum of in_features], float32: of the probing's counted
        # steps on all ranks, and of this step on this rank.
        self._total: torch.Tensor | None = None
        self._step = torch.empty(0)
        self._hooks: list[Any] = []

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        for modules in self._layers:
            yield from modules.items()

    @property
    def active(self) -> bool:
        return bool(self._hooks)

    def measure(self, on: bool) -> None:
        """Count inputs from now on, beginning with what :meth:`load_state_dict` has restored, or stop and forget."""
        if on == self.active or not self._layers:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if not on:
            self._total, self._step = None, torch.empty(0)
            return
        self._step = torch.zeros(self._numel, dtype=torch.float32, device=self._device)
        self._total = torch.zeros_like(self._step) if self._total is None else self._total
        for name, module in self._modules():
            self._hooks.append(module.register_forward_pre_hook(partial(self._add, name), with_kwargs=True))

    def _add(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self._counts():
            return
        start, features = self._spans[name]
        inputs = next(iter((*args, *kwargs.values()))).detach().reshape(-1, features)
        norms = torch.linalg.vector_norm(inputs, dim=0, dtype=torch.float32)
        self._step.narrow(0, start, features).add_(norms.square_())

    def discard(self) -> None:
        """Forget what this step has counted."""
        self._step.zero_()

    def end_step(self, last: bool) -> dict[int, float] | None:
        """Add what this step has counted on all ranks: one all-reduce of the sum of in_features float32.

        Args:
            last: the probing ends.

        Returns:
            Layer -> D_l in percent if ``last``; the same on every rank.

        Raises:
            ValueError: ``last``, and no layer has an outlier.
        """
        assert self._total is not None
        dist.all_reduce(self._step, group=self._group)
        self._total.add_(self._step)
        self.discard()
        return self._ratios(self._total) if last else None

    def _ratios(self, total: torch.Tensor) -> dict[int, float]:
        ratios, unused = {}, []
        for layer, modules in enumerate(self._layers):
            with _whole([_weight(module) for module in modules.values()]):
                matrices = []
                for name, module in modules.items():
                    squares, weight = total.narrow(0, *self._spans[name]), _weight(module)
                    matrices.append((weight if isinstance(module, nn.Linear) else weight.t(), squares))
                    unused += [] if squares.any() else [name]
                ratios[layer] = outlier_ratio(matrices, self._threshold)
        if unused and dist.get_rank() == 0:
            logger.warning(
                f"grass_ds: no input reached {listed(unused, most=6)} while outliers were measured: none of these "
                "weights is one"
            )
        if not any(ratios.values()):
            raise ValueError(
                f"no layer has an outlier: no |weight| x input norm is above grass.outlier_threshold = "
                f"{self._threshold:g} times the mean of its layer. Lower it (above 0; the ratios should differ between "
                'layers), or use "sampler": "grass" or "sampler": "uniform"'
            )
        return ratios

    def state_dict(self) -> torch.Tensor | None:
        """Squared input norms so far, [sum of in_features], float32, in host memory; None unless probing."""
        return None if self._total is None else self._total.to("cpu", copy=True)

    def load_state_dict(self, state: torch.Tensor | None) -> None:
        """Go on from ``state``; None: from nothing. The next :meth:`measure` says whether the probing goes on."""
        self.measure(False)
        if self._layers and state is not None:
            self._total = state.to(self._device, copy=True)


@contextmanager
def _whole(weights: Sequence[Any]) -> Iterator[None]:
    """Inside, the weights are whole on every rank: those that ZeRO-3 has released are gathered. Collective then."""
    released = [w for w in weights if getattr(w, "ds_status", None) is ZeroParamStatus.NOT_AVAILABLE]
    with GatheredParameters(released, enabled=bool(released)):
        yield
