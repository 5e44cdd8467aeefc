# SPDX-License-Identifier: Apache-2.0
"""Layer importance: the mean gradient norm (MGN) of each layer and the sampling distribution made of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any


class Signal(str, Enum):
    """What the score of a layer is made of."""

    GRADIENT_RMS = "gradient RMS"  # of every step that measures; the score is their mean
    OUTLIER_RATIO = "outlier ratio"  # D_l in percent, once, at the last step of a probing


_REMEDIES = {
    Signal.GRADIENT_RMS: "Layers are not drawn from broken gradients: lower the learning rate, clip gradients, or look "
    "for broken samples in the data",
    Signal.OUTLIER_RATIO: "Its weights or the inputs of its linear modules are not finite: look for broken samples in "
    "the data",
}


def softmax(logits: Sequence[float]) -> tuple[float, ...]:
    """Softmax in float64; safe for any finite or ``-inf`` logits as long as one is finite."""
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = math.fsum(weights)
    return tuple(w / total for w in weights)


def sampling_logits(scores: Sequence[float], temperature: float, normalization: str) -> tuple[float, ...]:
    """The logits m_l / tau of the draw, whose softmax is p_l; shifted so that the largest is 0.

    Args:
        scores: m_l >= 0 per layer, finite. All-zero scores give equal logits.
        temperature: tau > 0. With ``normalization="mean"`` it has no unit; with ``"none"`` its unit is the gradient's.
        normalization: ``"mean"`` divides every score by their mean (ours), ``"none"`` takes them raw.
    """
    top = max(scores)
    if normalization == "none" or top == 0.0:
        return tuple((m - top) / temperature for m in scores)
    relative = [m / top for m in scores]  # by the largest first: the sum of large finite scores may overflow
    mean = math.fsum(relative) / len(relative)
    return tuple((r - 1.0) / mean / temperature for r in relative)


class Importance:
    """The score m_l of every layer, and ``sums`` and ``counts`` of the measurements since the last update.

    A measurement is one step's ``signal``, float64. Scores are None before the first update; ``updates`` counts those
    of each layer.
    """

    def __init__(self, num_layers: int, signal: Signal = Signal.GRADIENT_RMS) -> None:
        self.signal = signal
        self.scores: tuple[float, ...] | None = None
        self.sums, self.counts = [0.0] * num_layers, [0] * num_layers
        self.updates = [0] * num_layers

    def add_measurements(self, rms: Mapping[int, float] | None, expected: Sequence[int]) -> None:
        """Add one step's measurement for each layer of ``expected``.

        Raises:
            ValueError: other layers than ``expected`` were measured, or a value is not finite; nothing was added then.
        """
        measured = {layer: float(value) for layer, value in (rms or {}).items()}
        if set(measured) != set(expected):
            raise ValueError(
                f"{self.signal.value} is wanted for layers {list(expected)}, got layers {sorted(measured)}"
            )
        for layer, value in measured.items():
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(
                    f"the {self.signal.value} of layer {layer} is {value!r}: expected a finite number >= 0. "
                    f"{_REMEDIES[self.signal]}"
                )
        for layer, value in measured.items():
            self.sums[layer] += value
            self.counts[layer] += 1

    def update_scores(self, alpha: Callable[[int], float]) -> None:
        """Move the scores towards the mean of the measurements, and drop these: m_l += alpha * (mean - m_l).

        Layers without a measurement keep their score, which is 0 before the first. The first update of a layer takes
        the plain mean, as does alpha = 1.

        Args:
            alpha: weight in (0, 1] of the measurement of a layer that has had so many updates, at least one.
        """
        scores = list(self.scores or (0.0,) * len(self.sums))
        for layer, (total, count) in enumerate(zip(self.sums, self.counts, strict=True)):
            if count:
                weight = alpha(self.updates[layer]) if self.updates[layer] else 1.0
                scores[layer] = weight * (total / count) + (1.0 - weight) * scores[layer]
                self.updates[layer] += 1
        self.scores = tuple(scores)
        self.drop_measurements()

    def drop_measurements(self) -> None:
        self.sums, self.counts = [0.0] * len(self.sums), [0] * len(self.counts)

    def state_dict(self) -> dict[str, Any]:
        """Plain lists of floats and ints; exact."""
        scores = None if self.scores is None else list(self.scores)
        return {
            "scores": scores,
            "sums": list(self.sums),
            "counts": list(self.counts),
            "updates": list(self.updates),
            "signal": self.signal.value,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``; from nothing if it is of another signal."""
        if Signal(state.get("signal", Signal.GRADIENT_RMS)) is not self.signal:
            self.scores, self.updates = None, [0] * len(self.updates)
            self.drop_measurements()
            return
        self.scores = None if state["scores"] is None else tuple(state["scores"])
        self.updates = list(state.get("updates", [int(self.scores is not None)] * len(self.updates)))
        self.sums, self.counts = list(state["sums"]), list(state["counts"])
