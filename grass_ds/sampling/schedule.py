# SPDX-License-Identifier: Apache-2.0
"""When things happen: probing (T_p), drawing (T_s), refreshing (T_u) and probing again, as pure functions of the step counters."""

from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """The two phases of GRASS: ``probe`` measures every layer and updates nothing, ``train`` trains the active set."""

    PROBE = "probe"
    TRAIN = "train"


def check_integer(key: str, value: object, minimum: int, remedy: str) -> None:
    """Raise ``ValueError`` naming ``key``, the value and the range unless ``value`` is an int >= ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"grass.{key} = {value!r} is not allowed: expected an integer >= {minimum}; {remedy}")


@dataclass(frozen=True)
class Schedule:
    """Periods in optimizer steps that were really applied; overflow-skipped steps do not count.

    ``probe_steps`` is the paper's T_p, ``sample_period`` T_s and ``refresh_period`` T_u; ``reprobe_period`` is ours, 0: never. A
    boundary at step n lies after the n-th train step. Where a refresh and a draw share one, the refresh goes first; probing again
    replaces both, and ends with a draw.
    """

    probe_steps: int
    sample_period: int
    refresh_period: int
    reprobe_period: int = 0

    def __post_init__(self) -> None:
        check_integer("probe_steps", self.probe_steps, 0, "set how many steps to probe")
        check_integer("sample_period", self.sample_period, 1, "set how many steps a draw is trained")
        check_integer("refresh_period", self.refresh_period, 1, "set how many steps lie between two score refreshes")
        check_integer("reprobe_period", self.reprobe_period, 0, "0 probes once, before training")

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
        """Of the first ``steps`` steps, of either kind, those that probe."""
        if self.reprobe_period == 0:
            return min(steps, self.probe_steps)
        rounds, rest = divmod(steps, self.probe_steps + self.reprobe_period)
        return rounds * self.probe_steps + min(rest, self.probe_steps)
