# SPDX-License-Identifier: Apache-2.0
"""When things happen: probing (T_p), drawing (T_s) and refreshing (T_u), as pure functions of the step counters."""

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

    ``probe_steps`` is the paper's T_p, ``sample_period`` T_s and ``refresh_period`` T_u. A boundary at step n lies
    after the n-th train step. Where a refresh and a draw share one, the refresh goes first.
    """

    probe_steps: int
    sample_period: int
    refresh_period: int

    def __post_init__(self) -> None:
        check_integer("probe_steps", self.probe_steps, 0, "set how many steps to probe")
        check_integer("sample_period", self.sample_period, 1, "set how many steps a draw is trained")
        check_integer("refresh_period", self.refresh_period, 1, "set how many steps lie between two score refreshes")

    def probing_done(self, probe_step: int) -> bool:
        """Whether ``probe_step`` counted probe steps are enough."""
        return probe_step >= self.probe_steps

    def refreshes_after(self, step: int) -> bool:
        """Whether the scores are refreshed after train step ``step`` (1-based)."""
        return step % self.refresh_period == 0

    def draws_after(self, step: int) -> bool:
        """Whether a new active set is drawn after train step ``step`` (1-based); the first draw opens training."""
        return step % self.sample_period == 0
