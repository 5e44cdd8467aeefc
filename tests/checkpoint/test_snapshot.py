# SPDX-License-Identifier: Apache-2.0
"""Copies for asynchronous saving: the same file as the original's, and nothing in common with it."""

import io
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import torch

from grass_ds.checkpoint.snapshot import snapshot

Pair = namedtuple("Pair", "left right")


@dataclass
class Scaler:
    scale: float
    history: list[int]


def state() -> dict[str, Any]:
    """All that may be found in a state dict."""
    base, betas = torch.arange(24, dtype=torch.float32), (0.9, 0.999)
    module = torch.nn.Linear(3, 2, dtype=torch.bfloat16).state_dict()
    return {
        "base": base,
        "row": base.view(4, 6)[1],
        "columns": base.view(4, 6).t(),
        "twice": [base, base],
        "zeros": torch.zeros(()).expand(1000),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, dtype=torch.int64),
        "module": module,
        "ordered": OrderedDict(b=torch.ones(2), a=torch.zeros(2, dtype=torch.bool)),
        "pair": Pair(torch.ones(3), (1, "two")),
        "groups": [{"betas": betas, "params": [i]} for i in range(3)],
        "scaler": Scaler(2.0, [1, 2]),
        "none": None,
    }


def file_of(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def change(value: Any) -> None:
    """Write to all that can be written to."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 0 and 0 not in value.stride():
            value.add_(1) if value.dtype != torch.bool else value.logical_not_()
    elif isinstance(value, dict):
        for item in value.values():
            change(item)
        value["more"] = 1
    elif isinstance(value, (list, tuple)):
        for item in value:
            change(item)
        if isinstance(value, list):
            value.append(1)
    elif isinstance(value, Scaler):
        value.scale += 1
        value.history.append(3)


def test_the_copy_is_written_as_the_original_and_does_not_change_with_it() -> None:
    """The same bytes: the same types, metadata, strides, and storages that are shared and as large."""
    original = state()
    copied, before = snapshot(original), file_of(original)
    assert file_of(copied) == before
    change(original)
    assert file_of(original) != before
    assert file_of(copied) == before


def test_values_that_are_not_those_of_the_storage_are_kept() -> None:
    numbers = torch.view_as_complex(torch.randn(4, 2))
    state = {
        "conjugate": numbers.conj(),
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    copied = snapshot(state)
    assert torch.equal(copied["conjugate"], numbers.conj())
    assert torch.equal(copied["sparse"].to_dense(), torch.eye(3))
    assert isinstance(copied["parameter"], torch.nn.Parameter)
    assert copied["parameter"].requires_grad
