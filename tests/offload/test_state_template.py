# SPDX-License-Identifier: Apache-2.0
"""What an optimizer keeps, learnt from a step on a few numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from grass_ds import GrassConfigError
from grass_ds.offload.state_template import StateTemplate, learn_template

CPU = torch.device("cpu")


def template_of(kind: type[torch.optim.Optimizer], **settings: Any) -> StateTemplate:
    optimizer = kind([nn.Parameter(torch.ones(3))], lr=0.1, **settings)  # type: ignore[call-arg]
    return learn_template(optimizer, optimizer.param_groups[0], CPU)


@pytest.mark.parametrize(
    ("kind", "settings", "moments", "scalars"),
    [
        (torch.optim.AdamW, {}, ("exp_avg", "exp_avg_sq"), {"step"}),
        (torch.optim.AdamW, {"fused": True}, ("exp_avg", "exp_avg_sq"), {"step"}),
        (torch.optim.AdamW, {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), {"step"}),
        (torch.optim.Adamax, {}, ("exp_avg", "exp_inf"), {"step"}),
        (torch.optim.RMSprop, {"momentum": 0.9}, ("square_avg", "momentum_buffer"), {"step"}),
        (torch.optim.SGD, {"momentum": 0.9}, ("momentum_buffer",), set()),
        (torch.optim.SGD, {}, (), set()),
    ],
)
def test_a_state_that_starts_at_zero(kind: Any, settings: dict[str, Any], moments: Any, scalars: set[str]) -> None:
    template = template_of(kind, **settings)
    assert sorted(template.moments) == sorted(moments)
    assert template.start is not None and set(template.start) == scalars


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.NAdam, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5}),
    ],
)
def test_a_state_that_only_the_optimizer_can_begin(kind: Any, settings: dict[str, Any]) -> None:
    template = template_of(kind, **settings)
    assert template.moments and template.start is None


def test_the_optimizer_is_left_as_it_was() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    groups = [dict(group) for group in optimizer.param_groups]
    template = learn_template(optimizer, optimizer.param_groups[0], CPU)
    assert not optimizer.state and [dict(group) for group in optimizer.param_groups] == groups
    assert optimizer.param_groups[0]["params"][0] is param and torch.equal(param, torch.ones(3))
    assert scheduler.last_epoch == 0
    assert template.start is not None and template.start["step"].item() == 0


def test_groups_may_keep_different_things() -> None:
    groups = [{"params": [nn.Parameter(torch.ones(3))], "amsgrad": amsgrad} for amsgrad in (False, True)]
    optimizer = torch.optim.AdamW(groups)
    moments = [learn_template(optimizer, group, CPU).moments for group in optimizer.param_groups]
    assert list(map(len, moments)) == [2, 3]


class Early(torch.optim.SGD):
    """Makes its state at construction, as Adagrad once did."""

    def __init__(self, params: Any, lr: float):
        super().__init__(params, lr=lr)
        for param in self.param_groups[0]["params"]:
            self.state[param]["sum"] = torch.zeros_like(param)

    def step(self, closure: Any = None) -> None:
        for param in self.param_groups[0]["params"]:
            self.state[param]["sum"].add_(param.grad)


def test_an_optimizer_whose_state_is_made_at_construction_is_refused() -> None:
    with pytest.raises(GrassConfigError, match=r"Early.*was not built with.*AdamW"):
        template_of(Early)
