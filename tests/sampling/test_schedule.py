# SPDX-License-Identifier: Apache-2.0
"""Period arithmetic."""

import pytest

from grass_ds.sampling.schedule import Schedule


def test_boundaries_lie_after_each_period():
    schedule = Schedule(probe_steps=3, sample_period=4, refresh_period=6, reprobe_period=5)
    assert [n for n in range(1, 13) if schedule.draws_after(n)] == [4, 8, 12]
    assert [n for n in range(1, 13) if schedule.refreshes_after(n)] == [6, 12]
    assert [n for n in range(1, 13) if schedule.reprobes_after(n)] == [5, 10]
    assert not any(Schedule(3, 4, 6).reprobes_after(n) for n in range(100))
    smallest = Schedule(probe_steps=1, sample_period=1, refresh_period=1)
    assert smallest.draws_after(1) and smallest.refreshes_after(1)


@pytest.mark.parametrize("reprobe", [0, 1, 2, 5])
def test_probe_steps_within_counts_them_one_by_one(reprobe):
    schedule, probed, left, trained = Schedule(3, 4, 6, reprobe), 0, 3, 0
    for steps in range(1, 40):
        if left:
            probed, left = probed + 1, left - 1
        else:
            trained += 1
            left = 3 if schedule.reprobes_after(trained) else 0
        assert schedule.probe_steps_within(steps) == probed
    assert (reprobe == 0) == (probed == 3)
