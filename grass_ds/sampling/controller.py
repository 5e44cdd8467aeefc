# SPDX-License-Identifier: Apache-2.0
"""The controller counts steps, keeps the scores and decides which layers are active, equally on all ranks."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grass_ds.sampling.importance import Importance, Signal
from grass_ds.sampling.registry import find_sampler
from grass_ds.sampling.samplers import SamplingSettings
from grass_ds.sampling.schedule import Phase, Schedule

FINGERPRINT_FIELDS = ("phase", "step", "probe_step", "active_layers", "scores", "sampler")
"""The fields of :meth:`Controller.fingerprint`, in order."""


@dataclass(frozen=True)
class Switch:
    """A change of the active set. All three are ascending layer indices; ``active`` is the new set."""

    active: tuple[int, ...]
    activated: tuple[int, ...]
    deactivated: tuple[int, ...]


class Controller:
    """Decides which layers train. Pure bookkeeping: equal inputs on two ranks give equal decisions.

    Args:
        num_layers: L, decoder blocks of the model (or weight matrices, see ``draws_weights``), at least 1.
        settings: the fields of :class:`SamplingSettings`. gamma >= L acts as the ``full`` sampler: no probing, no
            draws, no scores.

    Raises:
        ValueError: the sampler cannot be found, or does not accept its settings.

    Attributes:
        phase: :class:`Phase` of the coming step.
        active_layers: ascending indices of the layers the coming step trains; all of them while probing.
        visits: applied train steps per layer.
        step: applied train steps.
        probe_step: counted probe steps of the current or last probing.
        draws: active sets drawn by this object, also those equal to the set before.
    """

    def __init__(self, num_layers: int, **settings: Any) -> None:
        given = SamplingSettings(**settings)
        self._name, self._sampler = given.sampler, find_sampler(given.sampler)(num_layers, given)
        if "generator" not in self._sampler.state_dict():
            raise ValueError(f"sampler: the state_dict() of {given.sampler} lacks what super().state_dict() returns")
        if given.num_active_layers >= num_layers and not self._sampler.draws_weights:
            self._name = "full"
            self._sampler = find_sampler("full")(num_layers, replace(given, sampler_args={}, stratified=False))
        reprobe_period = given.reprobe_period if self._sampler.needs_scores and self._sampler.adaptive else 0
        self._schedule = Schedule(given.probe_steps, given.sample_period, given.refresh_period, reprobe_period)
        self._num_layers = num_layers
        self._importance = Importance(num_layers, self._sampler.signal)
        self.step = self.probe_step = self.draws = 0
        self.visits = (0,) * num_layers
        self.active_layers = self._begin()

    def _begin(self) -> tuple[int, ...]:
        """Enter the phase that the sampler needs; returns the first active set."""
        if self._sampler.needs_scores and self._importance.scores is None:
            return self._probe()
        return self._draw()

    @property
    def scores(self) -> tuple[float, ...] | None:
        """m_l per layer (gradient RMS, or the outlier ratio in percent; float64).

        None before the first measurements are complete, and for samplers that need none.
        """
        if self._sampler.needs_scores or self._sampler.adaptive:
            return self._importance.scores
        return self._sampler.learned

    @property
    def most_active(self) -> int:
        """The most layers that train at a time, probing aside."""
        return self._sampler.most_active

    @property
    def trains_adapters(self) -> bool:
        """Whether the sampler draws adapters and has :meth:`trials`. False where nothing is drawn."""
        return self._sampler.adapters

    @property
    def largest_share(self) -> float:
        """The largest share of the layers' weights that trains at a time; 1 where :attr:`most_active` says it."""
        return self._sampler.largest_share

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Chance of each layer to be picked first in the next draw; sums to 1. 1 / L before there are scores."""
        return self._sampler.probabilities(self.scores)

    @property
    def measuring(self) -> bool:
        """Whether :meth:`end_step` needs the :attr:`signal` of every active layer for the current step."""
        if self.phase is Phase.PROBE and self.signal is Signal.OUTLIER_RATIO:
            return self._ends_probing()
        return self.phase is Phase.PROBE or self._sampler.adaptive

    @property
    def signal(self) -> Signal | None:
        """What probing measures; None: the sampler never probes."""
        return self._sampler.signal if self._sampler.needs_scores else None

    @property
    def backward_layers(self) -> tuple[int, ...]:
        """Ascending indices of the layers whose gradients the coming step needs.

        Outliers are counted in forward: of their probing the topmost layer alone, without which there would be no
        backward pass.
        """
        if self.phase is Phase.PROBE and self.signal is Signal.OUTLIER_RATIO:
            return (self._num_layers - 1,)
        return self.active_layers

    def _ends_probing(self) -> bool:
        return self.probe_step + 1 >= self._schedule.probe_steps

    def end_step(self, measured: Mapping[int, float] | None) -> Switch | None:
        """Count one applied optimizer step, or one probe step; never call it for an overflow-skipped one.

        Args:
            measured: the :attr:`signal` of exactly the active layers if :attr:`measuring`, by layer index; otherwise
                ignored. Gradient RMS: sqrt(||g_l||^2 / N_l), from the gradient averaged over ranks, unscaled and
                before clipping. Outlier ratio: D_l in percent.

        Returns:
            The change of the active set from the next step on, None when it stays.

        Raises:
            ValueError: a number is not finite (names the layer) or is missing, or all gradients were 0 in a whole
                probing. The step is then not counted.
        """
        if self.measuring:
            self._importance.add_measurements(measured, self.active_layers)
        active = self._end_probe_step() if self.phase is Phase.PROBE else self._end_train_step()
        return None if active is None else self._switch_to(active)

    def _end_probe_step(self) -> tuple[int, ...] | None:
        done = self._ends_probing()
        if done and self.signal is Signal.GRADIENT_RMS and not any(self._importance.sums):
            raise ValueError(
                f"the gradient of every layer was 0 in all {self.probe_step + 1} probe steps: the loss does not "
                "depend on the layers. Look for labels that are all ignored (-100), a loss of 0, or an output layer "
                "of zeros"
            )
        self.probe_step += 1
        if not done:
            return None
        self._importance.update_scores(
            lambda updates: 1.0
        )  # a probing measures all layers anew: nothing of the old scores remains
        return self._draw()

    def _end_train_step(self) -> tuple[int, ...] | None:
        self.step += 1
        active = set(self.active_layers)
        self.visits = tuple(visits + (layer in active) for layer, visits in enumerate(self.visits))
        if self._schedule.reprobes_after(self.step):
            return self._probe()
        draws = self._draws_after(self.step)
        refreshes = draws if self._sampler.refreshes_at_draws else self._schedule.refreshes_after(self.step)
        if self._sampler.adaptive and refreshes:
            self._importance.update_scores(self._sampler.ema_weight)
        return self._draw() if draws else None

    def _draws_after(self, step: int) -> bool:
        return self._sampler.draws and (self._sampler.draws_next or self._schedule.draws_after(step))

    def _probe(self) -> tuple[int, ...]:
        self.phase, self.probe_step = Phase.PROBE, 0
        self._importance.drop_measurements()
        return tuple(range(self._num_layers))

    def _draw(self) -> tuple[int, ...]:
        self.phase = Phase.TRAIN
        self.draws += 1
        return self._sampler.draw(self.scores)

    def trials(self) -> list[tuple[int, ...]]:
        """Sets of layers whose response is to be suppressed before the coming step is counted; most often none.

        Ask once per applied step, and give the losses to :meth:`learn`.
        """
        due = self.phase is Phase.TRAIN and self._schedule.refreshes_after(self.step + 1)
        return self._sampler.trials() if due else []

    def learn(self, trials: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """Take the loss of each of the :meth:`trials`, averaged over ranks.

        Raises:
            ValueError: a loss is not finite.
        """
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"losses {[float(loss) for loss in losses]} with weakened adapters: not all are finite; lower the "
                "learning rate, or look for broken samples in the data"
            )
        self._sampler.learn(trials, losses)

    def upcoming(self) -> tuple[int, ...] | None:
        """The set that will be drawn after the coming step, None if none will; the controller does not change.

        The draw itself may differ where the scores are refreshed at the same boundary.
        """
        coming = self.step + 1
        if self.phase is not Phase.TRAIN or self._schedule.reprobes_after(coming) or not self._draws_after(coming):
            return None
        state = self._sampler.state_dict()
        drawn = self._sampler.draw(self.scores)
        self._sampler.load_state_dict(state)
        return drawn

    def probe_steps_within(self, steps: int) -> int:
        """The number of probe steps, which update no weight, among a run's first ``steps`` steps."""
        return self._schedule.probe_steps_within(steps) if self._sampler.needs_scores else 0

    def _switch_to(self, active: tuple[int, ...]) -> Switch | None:
        old, new = set(self.active_layers), set(active)
        self.active_layers = active
        return Switch(active, tuple(sorted(new - old)), tuple(sorted(old - new))) if new != old else None

    def fingerprint(self) -> tuple[int, ...]:
        """One integer in [0, 2**62) per field of :data:`FINGERPRINT_FIELDS`, to compare ranks at a switch.

        Equal numbers mean equal fields: scores and measurements bit by bit, ``sampler`` by name and state.
        """
        importance, sampler = self._importance.state_dict(), self._sampler.state_dict()
        sampler["generator"] = sampler["generator"].tolist()  # repr shortens tensors
        return (
            list(Phase).index(self.phase),
            self.step,
            self.probe_step,
            _digest(self.active_layers),
            _digest(importance),
            _digest((self._name, sampler)),
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on exactly, at any step; loads with ``torch.load(weights_only=True)``."""
        return {
            "num_layers": self._num_layers,
            "sampler": self._name,
            "phase": self.phase.value,
            "step": self.step,
            "probe_step": self.probe_step,
            "active_layers": list(self.active_layers),
            "visits": list(self.visits),
            "importance": self._importance.state_dict(),
            "sampler_state": self._sampler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state`` was taken.

        Changed settings (periods, gamma, tau, alpha) hold from the next boundary on; a changed seed does not matter.
        A changed sampler keeps step counters, visits and scores of its own signal. It draws its first set at once from
        its own fresh generator, and probes first if it needs scores that the state lacks. The active set may change by
        loading.

        Raises:
            ValueError: the state is of a model with another number of layers.
        """
        if state["num_layers"] != self._num_layers:
            raise ValueError(
                f"the checkpoint's GRASS state is of a model with {state['num_layers']} layers, this model has "
                f"{self._num_layers}: resume with the model it was saved from, or start a new run"
            )
        self.step, self.probe_step = state["step"], state["probe_step"]
        self.visits = tuple(state["visits"])
        self._importance.load_state_dict(state["importance"])
        if state["sampler"] == self._name:
            self.phase, self.active_layers = Phase(state["phase"]), tuple(state["active_layers"])
            self._sampler.load_state_dict(state["sampler_state"])
        else:
            self._importance.drop_measurements()
            self.active_layers = self._begin()


def _digest(value: object) -> int:
    """A 62-bit hash. ``repr`` tells floats apart bit by bit."""
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:8], "big") >> 2
