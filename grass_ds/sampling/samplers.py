# SPDX-License-Identifier: Apache-2.0
"""How the active set is drawn: one class per method, and the table that names them.

A new method is a subclass of :class:`Sampler` and an entry in :data:`SAMPLERS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from grass_ds.sampling.importance import sampling_logits, softmax


@dataclass(frozen=True)
class SamplerSettings:
    """gamma = ``num_active_layers`` of L = ``num_layers``, tau = ``temperature``, as in the ``"grass"`` block."""

    num_layers: int
    num_active_layers: int
    temperature: float
    score_normalization: str
    cyclic_order: str
    seed: int


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
        drawn.append(left.pop(_locate(weights, point)))
    return drawn


def _locate(weights: Sequence[float], point: float) -> int:
    """Index of the interval of the cumulated ``weights`` that holds ``point``; the last non-empty one past the end."""
    cumulated, last = 0.0, 0
    for index, weight in enumerate(weights):
        if weight > 0.0:
            cumulated, last = cumulated + weight, index
            if point < cumulated:
                return index
    return last


class Sampler:
    """Draws active sets: gamma layers, each equally likely, unless a subclass has other logits or another order.

    ``scores`` is the importance of every layer, None for samplers that do not need it.
    """

    needs_scores: ClassVar[bool] = False  # probe before the first draw
    adaptive: ClassVar[bool] = False  # keep measuring the active layers and refresh the scores
    draws: ClassVar[bool] = True  # False: the active set never changes

    def __init__(self, settings: SamplerSettings) -> None:
        self.settings = settings
        self._generator = torch.Generator(device="cpu").manual_seed(settings.seed)

    def _logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        return (0.0,) * self.settings.num_layers

    def probabilities(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        """Chance of each layer to be picked first in the next draw; sums to 1."""
        return softmax(self._logits(scores))

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        """The next active set: distinct layer indices, ascending. Advances the sampler's own state."""
        count = min(self.settings.num_active_layers, self.settings.num_layers)
        return tuple(sorted(draw_without_replacement(self._logits(scores), count, self._generator)))

    def state_dict(self) -> dict[str, Any]:
        """The private generator's state (uint8 tensor): with settings and scores it decides the coming draws."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the saved stream of draws; the configured seed no longer matters."""
        self._generator.set_state(state["generator"].cpu())  # a checkpoint may be loaded onto the device


class UniformSampler(Sampler):
    """LISA: gamma layers, each equally likely."""


class GrassSampler(Sampler):
    """GRASS: gamma layers by softmax(m / tau), scores refreshed while training."""

    needs_scores = True
    adaptive = True

    def _logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        """m_l / tau; equal while probing has not yet given scores."""
        if scores is None:
            return super()._logits(scores)
        return sampling_logits(scores, self.settings.temperature, self.settings.score_normalization)

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        """gamma distinct layers, ascending; ``ValueError`` without scores."""
        if scores is None:
            raise ValueError("layers cannot be drawn by importance before probing has measured it")
        return super().draw(scores)


class StaticSampler(GrassSampler):
    """Static GRASS, the paper's ablation: probe once, keep those scores."""

    adaptive = False


class CyclicSampler(Sampler):
    """BAdam: every layer once per cycle, in ascending, descending or newly shuffled order.

    ``probabilities`` are 1 / L: a layer's share of a cycle. The order of the next draw itself is fixed, not random.
    """

    def __init__(self, settings: SamplerSettings) -> None:
        super().__init__(settings)
        self._queue: list[int] = []

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        """The next gamma layers of the cycle, ascending.

        A draw that begins a new cycle skips the layers it already has; they stay first in the queue.
        """
        drawn: list[int] = []
        while len(drawn) < min(self.settings.num_active_layers, self.settings.num_layers):
            self._queue = self._queue or self._new_cycle()
            layer = next(i for i in self._queue if i not in drawn)
            self._queue.remove(layer)
            drawn.append(layer)
        return tuple(sorted(drawn))

    def _new_cycle(self) -> list[int]:
        count = self.settings.num_layers
        if self.settings.cyclic_order == "random":
            return draw_without_replacement((0.0,) * count, count, self._generator)
        return list(range(count)) if self.settings.cyclic_order == "ascending" else list(reversed(range(count)))

    def state_dict(self) -> dict[str, Any]:
        """The generator's state and the rest of the cycle."""
        return {**super().state_dict(), "queue": list(self._queue)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the saved cycle; a changed ``cyclic_order`` takes effect with the next one."""
        super().load_state_dict(state)
        self._queue = list(state["queue"])


class FullSampler(Sampler):
    """Plain training of every layer. ``probabilities`` are 1 / L by convention: nothing is ever drawn."""

    draws = False

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        """All layers."""
        return tuple(range(self.settings.num_layers))


SAMPLERS: dict[str, type[Sampler]] = {
    "grass": GrassSampler,
    "static": StaticSampler,
    "uniform": UniformSampler,
    "cyclic": CyclicSampler,
    "full": FullSampler,
}
