# SPDX-License-Identifier: Apache-2.0
"""How the active set is drawn: what samplers have in common, and those that draw whole layers.

A new method is a subclass of :class:`Sampler`, and an entry in :data:`grass_ds.sampling.registry.SAMPLERS` unless
another package has it.
"""

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch

from grass_ds.sampling.importance import Signal, sampling_logits, softmax


@dataclass(frozen=True)
class SamplingSettings:
    """The keys of the ``"grass"`` block that decide which layers train and when.

    gamma is ``num_active_layers``, T_p ``probe_steps``, T_s ``sample_period``, T_u ``refresh_period``, tau
    ``temperature`` and alpha ``ema_alpha``. :class:`grass_ds.config.GrassConfig` checks the ranges.
    """

    sampler: str
    num_active_layers: int
    probe_steps: int
    sample_period: int
    refresh_period: int
    reprobe_period: int
    temperature: float
    ema_alpha: float
    score_normalization: str
    cyclic_order: str | Sequence[int]
    seed: int
    stratified: bool = False
    sampler_args: Mapping[str, Any] = field(default_factory=dict)
    module_budget: float = 1.0
    sizes: Sequence[int] = ()  # elements of each layer, which the model has rather than the block; (): all alike


def draw_without_replacement(logits: Sequence[float], count: int, generator: torch.Generator) -> list[int]:
    """``count`` distinct indices, in the order drawn: each next one by the softmax over those that are left.

    Renormalizing the logits, not the probabilities, keeps a layer drawable whose weight underflows beside a dominant
    one. One 53-bit uniform per index and float64 arithmetic: the same on every machine.
    """
    left = list(range(len(logits)))
    drawn: list[int] = []
    for _ in range(count):
        weights = softmax([logits[i] for i in left])
        point = torch.rand((), generator=generator, dtype=torch.float64).item()
        last = max(index for index, weight in enumerate(weights) if weight > 0.0)  # the sum may round below 1
        drawn.append(left.pop(min(bisect(list(accumulate(weights)), point), last)))
    return drawn


class Sampler:
    """Draws gamma of L layers, each equally likely (LISA). Subclasses have other logits or another order.

    A subclass draws from ``self._generator`` alone, and has what else decides its draws in :meth:`state_dict`: then
    all ranks draw alike, and a resumed run draws on.

    Attributes:
        num_layers, settings: L, and the keys of the block.

    Raises:
        ValueError: a key of ``sampler_args`` is not in ``accepts``, an adaptive sampler needs another signal, or
            ``stratified`` is set for a sampler with a :meth:`draw` of its own.
    """

    accepts: ClassVar[Sequence[str]] = ()  # keys of "sampler_args"
    needs_scores: ClassVar[bool] = False  # probe before the first draw
    signal: ClassVar[Signal] = Signal.GRADIENT_RMS  # what probing measures
    adaptive: ClassVar[bool] = False  # keep measuring the active layers' gradients and refresh the scores
    draws: ClassVar[bool] = True  # False: the active set never changes
    draws_weights: ClassVar[bool] = False  # its "layers" are the weight matrices inside the blocks
    adapters: ClassVar[bool] = False  # its layers are those of adapters (PEFT), and it has :meth:`trials`
    refreshes_at_draws: ClassVar[bool] = False  # before every draw, instead of every ``refresh_period``

    def __init__(self, num_layers: int, settings: SamplingSettings) -> None:
        self.num_layers, self.settings = num_layers, settings
        self._count = min(settings.num_active_layers, num_layers)
        self._generator = torch.Generator(device="cpu").manual_seed(settings.seed)
        if self.adaptive and self.signal is not Signal.GRADIENT_RMS:
            raise ValueError(
                f"sampler: {settings.sampler} is adaptive, but only gradients are measured while training"
            )
        if settings.stratified and type(self).draw is not Sampler.draw:
            raise ValueError(f"stratified: sampler {settings.sampler} draws by rules of its own; leave it out")
        if unknown := sorted(set(settings.sampler_args) - set(self.accepts)):
            known = f"it has {', '.join(self.accepts)}" if self.accepts else "it has none"
            raise ValueError(f"sampler_args: {settings.sampler} has no argument {', '.join(unknown)}; {known}")

    @property
    def most_active(self) -> int:
        """The most layers that a draw may have."""
        return self._count

    @property
    def largest_share(self) -> float:
        """The largest share of the layers' weights that a draw may have; 1 where :attr:`most_active` says it."""
        return 1.0

    @property
    def strata(self) -> list[range]:
        """The layers of which a draw takes one each, in ascending order; of a single stratum it takes gamma."""
        parts = self._count if self.settings.stratified else 1
        bounds = [part * self.num_layers // parts for part in range(parts + 1)]
        return [range(low, high) for low, high in pairwise(bounds)]

    @property
    def draws_next(self) -> bool:
        """Whether the next draw comes after one step, whatever ``sample_period`` says."""
        return False

    def ema_weight(self, updates: int) -> float:
        """Weight of the new measurement of a layer whose score was updated so often before, at least once."""
        return self.settings.ema_alpha

    def logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        """One per layer; their softmax, within a stratum, is the chance of each to be picked first.

        Args:
            scores: importance m_l of every layer; None before there are measurements.
        """
        return (0.0,) * self.num_layers

    def probabilities(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        """Chance of each layer to be picked first in the next draw, all strata being alike; sums to 1."""
        logits, strata = self.logits(scores), self.strata
        return tuple(chance / len(strata) for part in strata for chance in softmax([logits[i] for i in part]))

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        """The next active set: distinct layer indices, ascending. Advances the sampler's own state."""
        logits, strata = self.logits(scores), self.strata
        count = self._count // len(strata)
        drawn = (draw_without_replacement([logits[i] for i in part], count, self._generator) for part in strata)
        return tuple(sorted(part[i] for part, found in zip(strata, drawn, strict=True) for i in found))

    @property
    def learned(self) -> tuple[float, ...] | None:
        """Scores that the sampler keeps itself, one per layer; None: it is given them."""
        return None

    def trials(self) -> list[tuple[int, ...]]:
        """Sets of layers to weaken, one forward pass each, before the scores are refreshed. Advances the state."""
        return []

    def learn(self, trials: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        """Take the losses of the ``trials``."""

    def state_dict(self) -> dict[str, Any]:
        """The private generator's state (uint8 tensor): with settings and scores it decides the coming draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the saved stream of draws; the configured seed no longer matters."""
        self._generator.set_state(state["generator"].cpu())  # a checkpoint may be loaded onto the device


class GrassSampler(Sampler):
    """GRASS: gamma layers by softmax(m / tau), scores refreshed while training."""

    needs_scores = True
    adaptive = True

    def logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        if scores is None:
            return super().logits(scores)
        return sampling_logits(scores, self.settings.temperature, self.settings.score_normalization)


class StaticSampler(GrassSampler):
    """Static GRASS, the paper's ablation: probe once, keep those scores."""

    adaptive = False


LAST = -1e4  # a logit far below log D of every D > 0 (-745): drawn when no other layer is left


class OutlierSampler(Sampler):
    """OWS, the sampling of OwLore (arXiv 2405.18380): gamma layers by p_l = D_l / sum D, measured once.

    ``scores`` are the outlier ratios D_l in percent (see :mod:`grass_ds.zero.outliers`). A layer with D_l = 0 has
    p_l = 0. If fewer than gamma layers have outliers, the others of a draw are of equal chance, where the paper's code
    (``numpy.random.choice``) would stop.
    """

    needs_scores = True
    signal = Signal.OUTLIER_RATIO

    def logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        if scores is None:
            return super().logits(scores)
        return tuple(math.log(ratio) if ratio > 0.0 else LAST for ratio in scores)


class CyclicSampler(Sampler):
    """BAdam: every layer once per cycle, in ascending, descending, newly shuffled or a given order.

    ``probabilities`` are a layer's share of a cycle: 1 / L, or 0 if a given order leaves it out. A changed
    ``cyclic_order`` takes effect with the next cycle.
    """

    def __init__(self, num_layers: int, settings: SamplingSettings) -> None:
        super().__init__(num_layers, settings)
        self._queue: list[int] = []
        order = settings.cyclic_order
        if isinstance(order, str):
            return
        if len(order) < self._count or len(set(order)) < len(order) or not set(order) <= set(range(num_layers)):
            raise ValueError(
                f"cyclic_order = {list(order)}: name at least {self._count} of the layers 0 to {num_layers - 1}, each once"
            )

    def probabilities(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        order = self.settings.cyclic_order
        if isinstance(order, str):
            return super().probabilities(scores)
        return tuple((layer in order) / len(order) for layer in range(self.num_layers))

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        """The next gamma layers of the cycle, ascending.

        A draw that begins a new cycle skips the layers it already has; they stay first in the queue.
        """
        drawn: list[int] = []
        while len(drawn) < self._count:
            self._queue = self._queue or self._new_cycle()
            layer = next(i for i in self._queue if i not in drawn)
            self._queue.remove(layer)
            drawn.append(layer)
        return tuple(sorted(drawn))

    def _new_cycle(self) -> list[int]:
        order = self.settings.cyclic_order
        if order == "random":
            return draw_without_replacement(self.logits(None), self.num_layers, self._generator)
        if not isinstance(order, str):
            return list(order)
        return sorted(range(self.num_layers), reverse=order == "descending")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "queue": list(self._queue)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._queue = list(state["queue"])


class FullSampler(Sampler):
    """Plain training of every layer. ``probabilities`` are 1 / L by convention: nothing is ever drawn."""

    draws = False

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        return tuple(range(self.num_layers))
