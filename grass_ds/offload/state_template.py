# SPDX-License-Identifier: Apache-2.0
"""What state the client's optimizer keeps, learnt from a step on a few numbers."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from grass_ds.config import GrassConfigError

_NUMEL = 8
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")
"""Names of Adam's moments in DeepSpeed's universal checkpoints and ``safe_*`` functions."""


@dataclass(frozen=True)
class StateTemplate:
    """State of one param group's parameters."""

    moments: tuple[str, ...]
    """Names of what is kept per element: ``exp_avg``, ``exp_avg_sq``."""
    start: Mapping[str, Any] | None
    """What is kept per tensor before the first step (``step``: 0), if this and moments of zeros are a fresh state; None
    if only the optimizer itself can make one."""


def learn_template(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], device: torch.device) -> StateTemplate:
    """Step a parameter of 8 elements with the group's hyper-parameters; the optimizer is left as it was.

    Raises:
        GrassConfigError: the optimizer cannot step parameters it was not built with, or counts steps per group.
    """
    weights, state = _one_step(optimizer, group, device, {})
    moments = tuple(name for name, value in state.items() if torch.is_tensor(value) and value.shape == (_NUMEL,))
    start = {name: _zero(value) for name, value in state.items() if name not in moments}
    zeros = {name: torch.zeros(_NUMEL, device=device) for name in moments}
    try:
        again, repeated = _one_step(optimizer, group, device, {**copy.deepcopy(start), **zeros})
    except Exception:
        return StateTemplate(moments, None)
    same = torch.equal(weights, again) and _equal(state, repeated)
    return StateTemplate(moments, start if same else None)


def _one_step(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], device: torch.device, state: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Weights and state after a step from ``state``."""
    param = nn.Parameter(torch.linspace(-1.0, 1.0, _NUMEL, device=device))
    param.grad = torch.linspace(0.5, -0.25, _NUMEL, device=device)
    probe = {**group, "params": [param]}
    groups, optimizer.param_groups = optimizer.param_groups, [probe]
    name = type(optimizer).__name__
    if state:
        optimizer.state[param] = state
    try:
        optimizer.step()
    except KeyError as error:
        raise GrassConfigError(
            f"the optimizer {name} cannot step a weight that it was not built with (missing state {error}); "
            "use one that makes its state at the first step, such as torch.optim.AdamW"
        ) from error
    finally:
        optimizer.param_groups = groups
        after = optimizer.state.pop(param, {})
    if probe.get("step", 0) != group.get("step", 0):
        raise GrassConfigError(
            f"the optimizer {name} counts steps per param group, but every layer has its own step count; "
            "use one that keeps it per parameter, such as torch.optim.AdamW"
        )
    return param.detach(), dict(after)


def _zero(value: Any) -> Any:
    if torch.is_tensor(value):
        return torch.zeros_like(value)
    return type(value)(0) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _equal(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
        for name, value in one.items()
    )
