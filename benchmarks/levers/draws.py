# SPDX-License-Identifier: Apache-2.0
"""Draws that are tried, and not part of the package: a ``"sampler"`` may be the path of a class."""

import math
from collections.abc import Sequence

import torch

from grass_ds.sampling.samplers import Sampler


class WindowSampler(Sampler):
    """gamma neighbours, each window equally likely: backward ends at its lowest layer."""

    def draw(self, scores: Sequence[float] | None) -> tuple[int, ...]:
        lowest = int(torch.randint(0, self.num_layers - self._count + 1, (), generator=self._generator))
        return tuple(range(lowest, lowest + self._count))


class WeightedSampler(Sampler):
    """gamma layers without replacement, with the chances ``sampler_args.weights``, one positive number per layer."""

    accepts = ("weights",)

    def logits(self, scores: Sequence[float] | None) -> tuple[float, ...]:
        return tuple(math.log(weight) for weight in self.settings.sampler_args["weights"])
