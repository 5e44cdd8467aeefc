# SPDX-License-Identifier: Apache-2.0
"""The form in which the optimizer state of a unit is kept between its steps: ``offload.state_format``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from grass_ds.config import GrassConfigError
from grass_ds.offload.codecs import (
    Bfloat16,
    Blocks,
    Codec,
    CutOff,
    Float32,
    Master,
    NoMaster,
    Plane,
    WholeMaster,
)

COMPRESSED: Mapping[str, bool] = {"exp_avg": False, "exp_avg_sq": True, "momentum_buffer": False}
"""Moments that lossy formats compress: averages that a step uses on their own. The value says whether a step divides by
the root. Other state stays fp32: centred RMSprop takes the root of ``square_avg`` - ``grad_avg`` ** 2, which is below
zero if the two are rounded apart."""
_LOSSY: Mapping[str, Callable[[bool], Codec]] = {"bf16": lambda root: Bfloat16(), "8bit": Blocks}


@dataclass(frozen=True)
class StateFormat:
    """A codec for the master weights and one for each moment. States are float32 [n]: master weights, moments."""

    name: str
    master: Master
    moments: tuple[Codec, ...]

    @property
    def planes(self) -> tuple[Plane, ...]:
        """What is stored: the planes of the master weights, then those of each moment."""
        return (*self.master.planes, *(plane for codec in self.moments for plane in codec.planes))

    @property
    def needs_weights(self) -> bool:
        """Whether the low-precision weights are part of the stored master weights."""
        return not isinstance(self.master, WholeMaster)

    @property
    def plain(self) -> bool:
        """Whether what is stored is the state itself."""
        return not self.needs_weights and all(isinstance(codec, Float32) for codec in self.moments)

    @torch.no_grad()
    def encode(
        self,
        state: Sequence[torch.Tensor],
        stored: Sequence[torch.Tensor],
        dtype: torch.dtype,
        seed: int,
        start: int = 0,
    ) -> None:
        """Write a state into the ``stored`` planes, see :meth:`Codec.encode`; ``dtype``: of the weights."""
        master, *parts = self._of_codecs(stored)
        for index, (codec, values, part) in enumerate(zip(self.moments, state[1:], parts, strict=True)):
            codec.encode(values, part, seed + index, start)
        # Last: what is stored of the master weights belongs to the weights, which are written after it.
        self.master.encode(state[0], master, dtype)

    @torch.no_grad()
    def decode(
        self, stored: Sequence[torch.Tensor], weights: torch.Tensor, moved: bool, state: Sequence[torch.Tensor]
    ) -> None:
        """Write what is stored into ``state``, see :meth:`Master.decode`; all on the device of ``stored``."""
        parts = self._of_codecs(stored)
        self.master.decode(next(parts), weights, moved, state[0])
        for codec, values, part in zip(self.moments, state[1:], parts, strict=True):
            codec.decode(part, values)

    def _of_codecs(self, stored: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        planes = iter(stored)
        codecs: tuple[Master | Codec, ...] = (self.master, *self.moments)
        for codec in codecs:
            yield list(islice(planes, len(codec.planes)))


def choose_format(name: str, moments: Sequence[str], dtype: torch.dtype) -> StateFormat:
    """The format ``name`` for an optimizer with these moments and weights of ``dtype``.

    Raises:
        GrassConfigError: ``exact`` with fp16 weights.
    """
    if name == "fp32":
        return StateFormat(name, WholeMaster(), (Float32(),) * len(moments))
    if name == "exact" and dtype == torch.float16:
        raise GrassConfigError(
            'grass.offload.state_format = "exact" with fp16 weights: what rounding to fp16 cuts off does not fit into 16 '
            'bits where a weight is small; train in bf16, or use "fp32", "bf16" or "8bit", which keep fp32 master weights '
            "then"
        )
    master: Master = WholeMaster()
    if dtype == torch.bfloat16:
        master = CutOff()
    elif dtype == torch.float32 and moments:  # something must be stored
        master = NoMaster()
    compress = _LOSSY.get(name)
    return StateFormat(
        name,
        master,
        tuple(compress(COMPRESSED[key]) if compress and key in COMPRESSED else Float32() for key in moments),
    )
