"""The AdamW steps that a sampled run must follow by the bit. Run inside a rank."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from helpers.models import snapshot


class Reference:
    """torch's AdamW on whole fp32 tensors, one optimizer per parameter: the steps of a single process."""

    def __init__(self, model: nn.Module, hyper: Any, dtype: torch.dtype = torch.float32):
        self.masters = {name: nn.Parameter(weight.to(dtype)) for name, weight in snapshot(model).items()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._hyper = hyper

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        for name, gradient in gradients.items():
            master = self.masters[name]
            if name not in self.optimizers:
                self.optimizers[name] = torch.optim.AdamW([{"params": [master], **self._hyper(name)}])
            self.optimizers[name].param_groups[0].update(self._hyper(name))
            master.grad = gradient.to(master.dtype)
            self.optimizers[name].step()

    def count(self, name: str) -> int:
        """Steps that bias correction has seen."""
        return int(self.optimizers[name].state[self.masters[name]]["step"])

    def forget(self, names: Iterable[str], weights: dict[str, torch.Tensor]) -> None:
        """Drop the optimizer state of ``names`` and take their masters anew from the live weights."""
        for name in names:
            self.optimizers.pop(name, None)
            self.masters[name] = nn.Parameter(weights[name].float().clone())
