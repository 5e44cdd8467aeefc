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
    """Periods in applied optimizer steps; steps skipped by an overflow do not count.

    ``probe_steps`` is the paper's T_p, ``sample_period`` T_s and ``refresh_period`` T_u; ``reprobe_period`` is ours,
    0: never. A boundary at step n lies after the n-th train step. Where a refresh and a draw share one, the refresh
    goes first; probing again replaces both, and ends with a draw.
    """

    probe_steps: int
    sample_period: int
    refresh_period: int
    reprobe_period: int = 0

    def probing_done(self, probe_step: int) -> bool:
        """Whether ``probe_step`` counted probe steps are enough."""
        return probe_step >= self.probe_steps

    def refreshes_after(self, step: int) -> bool:
        """Whether the scores are refreshed after train step ``step`` (1-based)."""
        return step % self.refresh_period == 0

    def draws_after(self, step: int) -> bool:
        """Whether a new active set is drawn after train step ``step`` (1-based); the first draw opens training."""
        return step % self.sample_period == 0

    def reprobes_after(self, step: int) -> bool:
        """Whether all layers are probed anew after train step ``step`` (1-based)."""
        return self.reprobe_period > 0 and step % self.reprobe_period == 0

    def probe_steps_within(self, steps: int) -> int:
        """The number of probe steps among the first ``steps`` steps of either phase."""
        if self.reprobe_period == 0:
            return min(steps, self.probe_steps)
        rounds, rest = divmod(steps, self.probe_steps + self.reprobe_period)
        return rounds * self.probe_steps + min(rest, self.probe_steps)
