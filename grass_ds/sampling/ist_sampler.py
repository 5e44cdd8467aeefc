# SPDX-License-Identifier: Apache-2.0
"""IST (arXiv 2410.11772): the sampler for adapters that learns from the loss without some of them."""

from collections.abc import Mapping, Sequence
from math import exp, fsum, log1p
from typing import Any

from grass_ds.sampling.samplers import Sampler, SamplingSettings, draw_without_replacement

TRIALS, RATE = 3, 10.0  # sets per update and step size, as released
ATTEMPTS = 20  # at different sets: there may be fewer, or one may be drawn nearly always


class IstSampler(Sampler):
    """IST: layers by sigmoid(-I), where a higher I means less important; I begins at 0.

    Every ``refresh_period`` steps, :data:`TRIALS` different sets of half of the layers are drawn by sigmoid(I), each
    without replacement, and the loss is measured with the adapters of each set weakened
    (:mod:`grass_ds.zero.response_suppression`). With rewards r_k = exp(-loss_k) - mean of exp(-loss), every layer i of
    set k has I_i += RATE * r_k * s_i * (1 - s_i), where s is the sigmoid of I before the update.
    """

    adapters = True

    def __init__(self, num_layers: int, settings: SamplingSettings) -> None:
        super().__init__(num_layers, settings)
        self._importance = [0.0] * num_layers

    @property
    def learned(self) -> tuple[float, ...]:
        return tuple(self._importance)

    def logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        return tuple(_log_sigmoid(-value) for value in self._importance)

    def trials(self) -> list[tuple[int, ...]]:
        logits, half = [_log_sigmoid(value) for value in self._importance], max(self.num_layers // 2, 1)
        sets: dict[tuple[int, ...], None] = {}
        for _ in range(ATTEMPTS):
            sets[tuple(sorted(draw_without_replacement(logits, half, self._generator)))] = None
            if len(sets) == TRIALS:
                break
        return list(sets)

    def learn(self, trials: Sequence[Sequence[int]], losses: Sequence[float]) -> None:
        gains = [exp(-loss) for loss in losses]
        mean = fsum(gains) / len(gains)
        slopes = [exp(_log_sigmoid(value) + _log_sigmoid(-value)) for value in self._importance]
        for layers, gain in zip(trials, gains, strict=True):
            for layer in layers:
                self._importance[layer] += RATE * (gain - mean) * slopes[layer]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "importance": list(self._importance)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._importance = list(state["importance"])


def _log_sigmoid(value: float) -> float:
    return -log1p(exp(-value)) if value > 0 else value - log1p(exp(value))
