# SPDX-License-Identifier: Apache-2.0
"""MISA (arXiv 2511.00056): the sampler that draws single weight matrices."""

from bisect import bisect
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import ceil
from typing import Any

from grass_ds.sampling.samplers import Sampler, SamplingSettings, draw_without_replacement

LARGEST_LOGIT, OLDEST = 5.0, 2  # the paper's G_clip and sample_last, as released


class ModuleSampler(Sampler):
    """MISA (arXiv 2511.00056): weight matrices by p_b ~ exp(min(5, G_b^2 / tau)), as many as a budget allows.

    G_b is the gradient norm of matrix b, averaged over each of its active periods and then over these: an exponential
    moving average with weight ``ema_alpha`` (the paper's 1 - beta), corrected for its start; 1 / tau is the paper's
    eta. A draw first takes all matrices that were never active, or the two whose last draw is longest ago. Others
    follow by p_b without replacement. A matrix that exceeds what is left of the budget is out of the draw. As long as
    any was never active, each set trains for one step.

    Raises:
        ValueError: the budget is below the largest matrix, which could never train.
    """

    draws_weights = adaptive = refreshes_at_draws = True

    def __init__(self, num_layers: int, settings: SamplingSettings) -> None:
        super().__init__(num_layers, settings)
        self._sizes = settings.sizes or (1,) * num_layers
        total = sum(self._sizes)
        self._budget = settings.module_budget * total
        if max(self._sizes) > self._budget:
            least = ceil(1e4 * max(self._sizes) / total) / 1e4
            raise ValueError(
                f"module_budget = {settings.module_budget:g}: the largest matrix has {least:g} of all weights in the "
                "layers and could never train; set at least that"
            )
        self._draws, self._last = 0, [0] * num_layers  # the number of each one's last draw; 0: never

    @property
    def most_active(self) -> int:
        return bisect(list(accumulate(sorted(self._sizes))), self._budget)

    @property
    def largest_share(self) -> float:
        return self.settings.module_budget

    @property
    def draws_next(self) -> bool:
        return 0 in self._last

    def ema_weight(self, updates: int) -> float:
        """That of a moving average which starts at 0 and is divided by 1 - beta^n after n updates."""
        return self.settings.ema_alpha / (1.0 - (1.0 - self.settings.ema_alpha) ** (updates + 1))

    def logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        if scores is None:
            return super().logits(scores)
        squares = (rms * rms * size for rms, size in zip(scores, self._sizes, strict=True))
        return tuple(min(LARGEST_LOGIT, square / self.settings.temperature) for square in squares)

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        by_age = sorted(range(self.num_layers), key=self._last.__getitem__)
        first = max(self._last.count(0), OLDEST)
        forced, rest = by_age[:first], sorted(by_age[first:])
        active, left, logits = [], self._budget, self.logits(scores)
        for index in forced:
            if self._sizes[index] <= left:
                active.append(index)
                left -= self._sizes[index]
        while rest := [index for index in rest if self._sizes[index] <= left]:
            (place,) = draw_without_replacement([logits[index] for index in rest], 1, self._generator)
            active.append(rest.pop(place))
            left -= self._sizes[active[-1]]
        self._draws += 1
        for index in active:
            self._last[index] = self._draws
        return tuple(sorted(active))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "draws": self._draws, "last": list(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._draws, self._last = state["draws"], list(state["last"])
