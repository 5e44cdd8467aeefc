# SPDX-License-Identifier: Apache-2.0
"""What a rank holds and moves, by category: arithmetic on units, layouts and measured activations.

[Note: Moments] Memory may peak at the loss, in the backward pass of any block, below the blocks or in the optimizer's
step, while training or while probing. Each of these moments has its own activations, gradients and gathered weights;
the plan is the largest. Which layers are active is random. Of all sets, that of the lowest layer and the highest ones
needs most: every block keeps something for backward, and the gradients of the highest wait longest. With ``expansion``
the inactive blocks above the lowest train, too, and leave signs instead of gradients.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grass_ds.core.signs import PER_BYTE
from grass_ds.core.units import Unit
from grass_ds.offload.build import count_host_buffers, state_layout
from grass_ds.offload.chunk_files import file_bytes
from grass_ds.offload.chunks import StateLayout
from grass_ds.offload.codecs import PIECE, PIECE_BYTES
from grass_ds.offload.state_format import StateFormat, choose_format
from grass_ds.offload.state_template import MOMENT_KEYS
from grass_ds.plan.activations import Activations, BlockBytes
from grass_ds.plan.gathering import gathered_numel, persistent_numel
from grass_ds.plan.model_shape import ModelShape
from grass_ds.plan.run_shape import RunShape
from grass_ds.sampling.importance import Signal
from grass_ds.zero import step as sign_step

FP32 = 4
STEP_BYTES = 12
"""Per element of a chunk in its step: its gradient in fp32 and two temporaries of AdamW."""
CODE_BYTES = 1
"""Per element whose sign is packed, beside a copy of its gradient, see :func:`grass_ds.core.signs.pack_signs`."""


@dataclass(frozen=True)
class Moment:
    """Bytes on the device of a rank at one moment of a step, beside what is always there.

    ``has_state``: optimizer state, or its window, is there; it is not during a probing that precedes all training.
    """

    name: str
    activations: int
    gradients: int
    gathered: int = 0
    has_state: bool = True


@dataclass(frozen=True)
class Prediction:
    """Bytes on one rank once all layers have trained.

    Attributes:
        weights: low-precision ones, at rest.
        state, window: optimizer state that stays on the device, and buffers through which the rest passes.
        moments: see [Note: Moments].
        saved: activations that wait for backward at the loss.
        gradients: the most that is held of gradients.
        host, disk: optimizer state, or its buffers, in host memory; state files.
        stepped: bytes of stored state that a step reads and writes back; through the link with ``offload``.
        traffic: collective -> bytes of its largest argument, summed over a step.
        flops: of a step.
    """

    weights: int
    state: int
    window: int
    moments: tuple[Moment, ...]
    saved: int
    gradients: int
    host: int
    disk: int
    stepped: int
    traffic: dict[str, int]
    flops: int

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: sum(self._at(moment).values()))

    @property
    def device(self) -> dict[str, int]:
        """Category -> bytes at the peak."""
        return self._at(self.peak)

    def _at(self, moment: Moment) -> dict[str, int]:
        return {
            "weights": self.weights,
            "gradients": moment.gradients,
            "optimizer state": moment.has_state * self.state,
            "activations": moment.activations,
            "window": moment.has_state * self.window,
            "gathered weights": moment.gathered,
        }

    @property
    def total(self) -> int:
        """Most bytes on the device."""
        return sum(self.device.values())


class SampledRun:
    """The parts of a prediction, see :func:`predict`."""

    def __init__(self, model: ModelShape, run: RunShape, active: Collection[int] | None = None) -> None:
        assert run.grass is not None
        self.model, self.run, self.grass = model, run, run.grass
        self.layers = model.layers_of(run.grass)
        if self.layers.names != self.layers.blocks:
            raise ValueError(f'grass.sampler = "{run.grass.sampler}": only samplers of whole layers can be planned')
        self.always = model.always_active(run.grass, self.layers)
        self.controller = run.grass.controller(self.layers)
        self.units = model.units(self.layers, self.always, run.ranks, run.stage == 3)
        self.blocks = len(self.layers.blocks)
        self.gamma = self.controller.most_active
        highest = range(self.blocks - self.gamma + 1, self.blocks)
        self.active = {0, *highest} if active is None else set(active)
        self.expanded = self._expanded()
        self.trained = self.active | self.expanded
        self.activations: Activations = model.activations(
            self.always, run.micro_batch, run.sequence, run.checkpointing, run.stage == 3
        )
        self.whole = model.backward_is_whole(self.always)
        self.formats: dict[Any, StateFormat] = {
            (0, model.dtype): choose_format(run.grass.offload.state_format, MOMENT_KEYS, model.dtype)
        }
        self.layout: StateLayout = state_layout(run.grass.offload, self.units, self.formats)

    # ---- weights and state --------------------------------------------------------------------------------------------

    def weights(self) -> int:
        """At rest: whole, or partitions and what is small enough to stay gathered."""
        if self.run.stage < 3:
            return self.run.width * sum(unit.padded_numel for unit in self.units)
        kept = persistent_numel(self.units, self.run.gather)
        return self.run.width * (sum(unit.shard_numel for unit in self.units) + kept)

    def state_bytes(self, units: Collection[Unit]) -> int:
        """Stored state of this rank's shards."""
        return sum(plane.nbytes(unit.shard_numel) for unit in units for plane in self.layout.planes_of(unit))

    @property
    def _trainable(self) -> list[Unit]:
        return [unit for unit in self.units if unit.ever_active]

    def units_of(self, layers: Collection[int]) -> list[Unit]:
        """Of these layers, and those that are always active."""
        return [unit for unit in self.units if unit.always or unit.layer in layers]

    def _expanded(self) -> set[int]:
        """Inactive blocks that take a sign step."""
        if self.grass.expansion == 0:
            return set()
        depths = [self.grass.expansion_depth, *self.active]
        return set(range(min(depth for depth in depths if depth is not None), self.blocks)) - self.active

    def decoded(self) -> int:
        plain = all(form.plain for form in self.formats.values())
        return 0 if plain else FP32 * (1 + len(MOMENT_KEYS)) * self.layout.chunk_numel

    def state_and_window(self) -> tuple[int, int]:
        """On the device."""
        offload = self.grass.offload
        if offload.device == "none":
            return self.state_bytes(self._trainable), self.decoded()
        stepped = self.units_of(self.active)
        if offload.residency == "period":
            switching = [unit for unit in self._trainable if not unit.always and unit.layer not in self.active]
            coming = sorted(switching, key=lambda unit: -unit.shard_numel)[: self.gamma]
            return self.state_bytes([*stepped, *coming]), self.decoded()
        chunks = sum(len(self.layout.chunks(unit)) for unit in stepped)
        return 0, min(offload.device_buffers, chunks) * self.layout.buffer_bytes + self.decoded()

    def host_and_disk(self) -> tuple[int, int]:
        offload = self.grass.offload
        if offload.device == "cpu":
            return self.state_bytes(self._trainable), 0
        if offload.device == "none":
            return 0, 0
        count = count_host_buffers(offload, self.layout, self.units, self.gamma)
        return count * self.layout.buffer_bytes, sum(file_bytes(unit, self.layout) for unit in self._trainable)

    def lowest(self, trained: Collection[int]) -> int:
        """The block at which backward ends, if these have a gradient."""
        return 0 if self.whole else min(trained)

    # ---- moments ------------------------------------------------------------------------------------------------------

    def moments(self) -> Iterator[Moment]:
        """Of a step that trains, and of one that probes if the sampler does."""
        yield from self._of_step(self.trained, keeps=True)
        if self._probed:
            again = self.grass.reprobe_period > 0
            yield from (replace(moment, has_state=again) for moment in self._of_step(self._probed, keeps=False))

    def _of_step(self, trained: set[int], keeps: bool) -> Iterator[Moment]:
        what = "" if keeps else "probing: "
        units, lowest = self.units_of(trained), self.lowest(trained)
        costs, head = self._costs(trained), self._head_backward(units)
        below = [sum(cost.saved for cost in costs[:index]) for index in range(self.blocks + 1)]
        above = [unit for unit in units if unit.layer is None and unit.kind not in self.layers.below]
        loss = self.gradients_before(units, keeps)
        yield Moment(f"{what}loss", below[-1] + self.activations.loss, loss, self._gathered(self.blocks, lowest))
        if head is not None:
            held = self.gradients_at(units, above, keeps)
            yield Moment(f"{what}head", below[-1] + head, held, self._gathered(self.blocks, lowest))
        for index in range(self.blocks - 1, lowest - 1, -1):
            done = [*above, *(unit for unit in units if unit.layer is not None and unit.layer >= index)]
            held = self.gradients_at(units, done, keeps, current=index in trained)
            activations = below[index] + costs[index].backward
            if keeps and index in self.expanded:
                activations += (self.run.width + CODE_BYTES) * done[-1].shard_numel
            yield Moment(f"{what}backward of layer {index}", activations, held, self._gathered(index, lowest))
        if self.activations.below:
            held = self.gradients_at(units, units, keeps)
            yield Moment(f"{what}backward of embeddings", self.activations.below, held, self._gathered(0, 0))
        if keeps:
            yield Moment("optimizer step", self._step_workspace(), sum(map(self._kept, units)))

    def _costs(self, trained: set[int]) -> list[BlockBytes]:
        """Per block, if these have a gradient."""
        lowest, costs = self.lowest(trained), []
        for index in range(self.blocks):
            form = self.activations.trained if index in trained else self.activations.frozen
            if index == lowest and not self.whole:
                form = self.activations.lowest
            costs.append(form[index] if index >= lowest else BlockBytes(0, 0))
        return costs

    def _head_backward(self, units: Collection[Unit]) -> int | None:
        """Activations while the gradient of a projection to the vocabulary that trains is made."""
        heads = [unit for unit in units if unit.kind == ("embed" if self.layers.tied else "head")]
        vocabulary = getattr(self.model.config, "vocab_size", 0)
        if not heads or not vocabulary:
            return None
        largest = max(unit.sizes[0] for unit in heads)
        return self.activations.outside + self.run.width * (self.run.tokens * vocabulary + largest)

    def saved(self) -> int:
        """Activations that wait at the loss, while training or probing."""
        sets = [self.trained, *([probed] if (probed := self._probed) else [])]
        return max(sum(cost.saved for cost in self._costs(trained)) for trained in sets) + self.activations.outside

    @property
    def _probed(self) -> set[int]:
        """Layers with a gradient while probing; none for samplers that do not."""
        if self.controller.signal is None:
            return set()
        return {self.blocks - 1} if self.controller.signal is Signal.OUTLIER_RATIO else set(range(self.blocks))

    def _gathered(self, index: int, lowest: int) -> int:
        """Weights that ZeRO-3 has gathered, beside those that stay so, in backward of a block (or at the loss)."""
        if self.run.stage < 3:
            return 0
        return self.run.width * gathered_numel(self.units, self.run, self.blocks, index, lowest)

    def _step_workspace(self) -> int:
        """Memory of one chunk's step: AdamW's, or the conversion's beside the gradient (a CPU needs less)."""
        chunk, form = self.layout.chunk_numel, next(iter(self.formats.values()))
        converting = 0 if form.plain else FP32 * chunk + PIECE_BYTES * min(chunk, PIECE)
        signed = max((unit.shard_numel for unit in self.units if unit.layer in self.expanded), default=0)
        signing = sign_step.PIECE_BYTES[self.model.dtype] * min(signed, sign_step.PIECE)
        return max(STEP_BYTES * chunk, converting, signing)

    # ---- gradients ----------------------------------------------------------------------------------------------------

    @property
    def reduces_always(self) -> bool:
        """Whether every micro-batch crosses ranks, rather than the last of a step (ZeRO-1)."""
        return self.run.stage > 1 or self.run.accumulation == 1 or self.grass.sampler == "grass"

    def gradients_before(self, units: Sequence[Unit], keeps: bool) -> int:
        """Of earlier micro-batches: shards, or in ZeRO-1 whole gradients."""
        if not keeps or self.run.accumulation == 1:
            return 0
        return self.run.width * (_shards(units) if self.reduces_always else sum(u.padded_numel for u in units))

    def gradients_at(self, units: Sequence[Unit], done: Sequence[Unit], keeps: bool, current: bool = True) -> int:
        """While the last unit of ``done`` is reduced (or, if it is not ``current``, after it)."""
        held = self.gradients_before(units, keeps)
        if keeps and self.run.accumulation == 1:
            held += sum(map(self._kept, done[:-1] if current else done))
        if not done or not current:
            return held
        last = done[-1]
        if keeps and not self.reduces_always:
            return held + self.run.width * last.shard_numel
        return held + self.run.width * (last.shard_numel + last.padded_numel)

    def _kept(self, unit: Unit) -> int:
        """Of a reduced gradient, until the step: this rank's shard, or its signs."""
        return -(-unit.shard_numel // PER_BYTE) if unit.layer in self.expanded else self.run.width * unit.shard_numel

    def gradients(self) -> int:
        """The most that is held, while training or probing."""
        held = []
        for trained, keeps in ((self.trained, True), (self._probed, False)):
            units = self.units_of(trained) if trained else []
            held += [self.gradients_at(units, units[: n + 1], keeps) for n in range(len(units))]
        return max(held)


def _shards(units: Collection[Unit]) -> int:
    return sum(unit.shard_numel for unit in units)
