# SPDX-License-Identifier: Apache-2.0
"""When layers are probed (T_p), drawn (T_s) and their scores refreshed (T_u): pure functions of step counters."""

from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """The two phases of GRASS: ``probe`` measures every layer and updates nothing, ``train`` trains the active set."""

    PROBE = "probe"
    TRAIN = "train"


@dataclass(frozen=True)
class Schedule:
    """Periods in applied optimizer steps; steps skipped by an overflow do not count. ``reprobe_period`` 0: never.

    A boundary at step n lies after the n-th train step (1-based). Where a refresh and a draw share one, the refresh
    goes first; probing again replaces both, and ends with a draw.
    """

    probe_steps: int
    sample_period: int
    refresh_period: int
    reprobe_period: int = 0

    def refreshes_after(self, step: int) -> bool:
        return step % self.refresh_period == 0

    def draws_after(self, step: int) -> bool:
        return step % self.sample_period == 0

    def reprobes_after(self, step: int) -> bool:
        return self.reprobe_period > 0 and step % self.reprobe_period == 0

    def probe_steps_within(self, steps: int) -> int:
        """The number of probe steps among the first ``steps`` steps of either phase."""
        if self.reprobe_period == 0:
            return min(steps, self.probe_steps)
        rounds, rest = divmod(steps, self.probe_steps + self.reprobe_period)
        return rounds * self.probe_steps + min(rest, self.probe_steps)
