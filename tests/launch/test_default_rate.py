# SPDX-License-Identifier: Apache-2.0
"""The learning rate that launch/train.py takes when it is given none."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.programs import ROOT

from launch import arguments, learning_rate, methods

PAGE = (ROOT / "docs" / "training.md").read_text()


def config(**grass: Any) -> dict[str, Any]:
    return {"grass": grass}


@pytest.mark.parametrize(
    ("ds_config", "adapters", "rate"),
    [
        ({}, False, 1e-4),
        ({}, True, 4e-4),
        (config(sampler="ist", num_active_layers=8), True, 4e-4),
        (config(enabled=False), False, 1e-4),
        (config(sampler="full"), False, 1e-4),
        (config(), False, 2e-4),  # 8 layers
        (config(num_active_layers=2), False, 8e-4),
        (config(num_active_layers=1), False, 8e-4),
        (config(sampler="uniform", num_active_layers=8), False, 2e-4),
        (config(sampler="uniform", num_active_layers=30), False, 1e-4),
        (config(sampler="uniform", num_active_layers=8, always_active=["norm"]), False, 2e-4),
        (config(sampler="uniform", num_active_layers=2, always_active=["embed"]), False, 2e-4),
        (config(sampler="module", num_active_layers=8), False, 8e-4),
    ],
)
def test_it_follows_what_trains(ds_config: dict[str, Any], adapters: bool, rate: float) -> None:
    assert learning_rate.default(ds_config, adapters) == pytest.approx(rate, rel=1e-12)


def test_the_page_has_these_rates() -> None:
    def text(rate: float, digits: int = 0) -> str:
        return f"{rate:.{digits}e}".replace("e-0", "e-")

    for rate in (learning_rate.FULL, learning_rate.EVERYWHERE, learning_rate.ADAPTERS):
        assert f"| {text(rate)}" in PAGE
    rule = f"{text(learning_rate.PER_LAYER, 1)} / `num_active_layers`"
    assert f"{rule}, between {text(learning_rate.SMALLEST)} and {text(learning_rate.LARGEST)} |" in PAGE


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_has_one(method: str) -> None:
    file = json.loads((methods.CONFIGS / methods.METHODS[method].config).read_text())
    assert 1e-4 <= learning_rate.default(file, methods.METHODS[method].adapters) <= 8e-4


@pytest.mark.parametrize(
    ("more", "in_file", "rate"), [([], "auto", 2e-4), (["--learning_rate", "0.5"], "auto", 0.5), ([], 0.25, 0.25)]
)
def test_a_rate_that_is_given_is_taken(
    tmp_path: Path, more: list[str], in_file: Any, rate: float, without_ranks: None
) -> None:
    ds_config = json.loads((methods.CONFIGS / "grass.json").read_text())
    ds_config["optimizer"]["params"]["lr"] = in_file
    file = tmp_path / "own.json"
    file.write_text(json.dumps(ds_config))
    options = ["--deepspeed", str(file), "--output_dir", str(tmp_path / "out"), "--bf16", "false", *more]
    parsed = arguments.parse(options)
    assert parsed.training.learning_rate == rate
    assert parsed.ds_config["optimizer"]["params"]["lr"] == rate


def test_a_number_of_layers_that_is_planned_later_needs_a_rate() -> None:
    with pytest.raises(ValueError, match=r"set --learning_rate to 0\.0016 / layers, between 0\.0001 and 0\.0008"):
        learning_rate.default(config(memory_budget="22GB", row_length=512), False)
