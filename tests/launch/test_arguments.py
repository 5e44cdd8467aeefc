# SPDX-License-Identifier: Apache-2.0
"""The command line of launch/train.py, as far as it is more than the Trainer's."""

from types import SimpleNamespace
from typing import Any

import pytest

from launch.arguments import _seed_the_sampler


@pytest.mark.parametrize(("block", "seed"), [({}, 7), ({"seed": None}, 7), ({"seed": 3}, 3)])
def test_the_sampler_follows_the_seed_of_the_run(block: dict[str, Any], seed: int) -> None:
    used = {"grass": dict(block)}
    training: Any = SimpleNamespace(seed=7, hf_deepspeed_config=SimpleNamespace(config=used))
    read: dict[str, Any] = {"grass": dict(block)}
    _seed_the_sampler(read, training)
    assert (used["grass"]["seed"], read["grass"]["seed"]) == (seed, seed)


def test_a_stock_configuration_gets_no_block() -> None:
    config: dict[str, Any] = {"bf16": {"enabled": True}}
    _seed_the_sampler(config, SimpleNamespace(seed=7, hf_deepspeed_config=None))  # type: ignore[arg-type]
    assert config == {"bf16": {"enabled": True}}
