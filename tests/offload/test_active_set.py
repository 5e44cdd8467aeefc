# SPDX-License-Identifier: Apache-2.0
"""How many chunks train at a time: an upper bound that is not far above."""

import random
from itertools import combinations

import pytest
from helpers.state_rig import make_unit

from grass_ds.offload.chunks import StateLayout

SIZES = [300, 64, 64, 300, 700, 700, 128]
LAYOUT = StateLayout(planes={}, chunk_numel=128)


@pytest.mark.parametrize("budget", [0.32, 0.5, 0.9])
def test_of_layers_within_a_share_of_the_weights(budget: float) -> None:
    """Against all sets of layers that fit the budget, one unit each."""
    rng = random.Random(0)
    units = [make_unit(f"layers.{index}/0", index, size, rng) for index, size in enumerate(SIZES)]
    sets = [chosen for count in range(1, len(units) + 1) for chosen in combinations(units, count)]
    fitting = [chosen for chosen in sets if sum(unit.numel for unit in chosen) <= budget * sum(SIZES)]
    most = max(map(len, fitting))
    needed = max(sum(len(LAYOUT.chunks(unit)) for unit in chosen) for chosen in fitting)
    norm = make_unit("norm/0", None, 16, rng)
    bound = LAYOUT.largest_active_set([norm, *units], most, budget)
    assert needed + 1 <= bound <= needed + most + 1
    by_number = LAYOUT.largest_active_set([norm, *units], most)
    assert by_number == 1 + sum(sorted((len(LAYOUT.chunks(unit)) for unit in units), reverse=True)[:most]) >= bound
