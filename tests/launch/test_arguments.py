# SPDX-License-Identifier: Apache-2.0
"""The command line of launch/train.py, as far as it is more than the Trainer's."""

from typing import Any

import pytest

from launch.arguments import _seed_the_sampler


@pytest.mark.parametrize(
    ("config", "seeded"),
    [
        ({"grass": {}}, {"grass": {"seed": 7}}),
        ({"grass": {"seed": None}}, {"grass": {"seed": 7}}),
        ({"grass": {"seed": 3}}, {"grass": {"seed": 3}}),
        ({"bf16": {"enabled": True}}, {"bf16": {"enabled": True}}),
    ],
)
def test_the_sampler_follows_the_seed_of_the_run(config: dict[str, Any], seeded: dict[str, Any]) -> None:
    _seed_the_sampler(config, 7)
    assert config == seeded
