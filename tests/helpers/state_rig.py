# SPDX-License-Identifier: Apache-2.0
"""A state store without an engine: random steps on random units, beside plain tensors that do the same."""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from grass_ds.config import OffloadConfig
from grass_ds.core.units import ReplicatedUnit, Unit
from grass_ds.offload import build
from grass_ds.offload.block_io import BlockIO, Piece
from grass_ds.offload.copies import Copies
from grass_ds.offload.state_files import StateFile
from grass_ds.offload.state_template import learn_template
from grass_ds.offload.store import StateStore, UnitState
from grass_ds.zero.step import step_unit

LAYERS, GAMMA = 5, 2
MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
adamw: MakeOptimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


def make_units(rng: random.Random, largest: int = 6000) -> list[Unit]:
    """A module that always trains, and two units per layer: several grains with an odd end, and a few elements."""
    always = make_unit("norm/0", None, rng.randrange(16, largest), rng)
    layers = [
        make_unit(f"layers.{layer}/{group}", layer, numel, rng)
        for layer in range(LAYERS)
        for group, numel in enumerate((rng.randrange(largest // 2, largest), rng.randrange(8, 64)))
    ]
    return [always, *layers]


def make_unit(name: str, layer: int | None, numel: int, rng: random.Random) -> Unit:
    weights = torch.randn(numel, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    param = nn.Parameter(weights.to(torch.bfloat16))
    kind = "norm" if layer is None else "block"
    unit = ReplicatedUnit(name, kind, layer, 0, [param], [name], world=1, rank=0, always=layer is None)
    unit.flatten_weights()
    return unit


class Plain:
    """What one unit should be: an optimizer of its own on whole tensors."""

    def __init__(self, unit: Unit, make: MakeOptimizer):
        self.unit, self._make = unit, make
        self.weights = unit.shard.clone()
        self.optimizer: torch.optim.Optimizer | None = None
        self.master = nn.Parameter(torch.empty(0))

    @property
    def state(self) -> dict[str, Any]:
        assert self.optimizer is not None
        return self.optimizer.state[self.master]

    def step(self, gradient: torch.Tensor) -> None:
        if self.optimizer is None:
            self.start(self.weights.to(torch.float32))
        self.master.grad = gradient.clone()
        self.optimizer.step()
        self.weights = self.master.detach().to(self.weights.dtype)

    def start(self, master: torch.Tensor) -> None:
        """Begin with these fp32 weights and no moments."""
        self.master = nn.Parameter(master.clone())
        self.optimizer = self._make([self.master])

    def forget(self) -> None:
        self.optimizer = None

    def differs(self, store: StateStore) -> str | None:
        """What is not the same bits in the store; None if nothing is."""
        if not torch.equal(self.weights, self.unit.shard):
            return f"weights of {self.unit.name}"
        if self.optimizer is None or self.unit not in store:
            return None if self.optimizer is None and self.unit not in store else f"existence of {self.unit.name}"
        state = store[self.unit]
        if not torch.equal(state.master, self.master):
            return f"master weights of {self.unit.name}"
        found = {**state.moments, **state.scalars}
        for name, value in self.state.items():
            same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
            if not same:
                return f"{name} of {self.unit.name}"
        return None


class Rig:
    """A store, and what it should hold. Every random decision is drawn from one seed."""

    def __init__(self, store: StateStore, units: list[Unit], make: MakeOptimizer, rng: random.Random):
        self.store, self.units, self.rng = store, units, rng
        self.plain = {unit: Plain(unit, make) for unit in units}
        self._optimizer = make([nn.Parameter(torch.zeros(1))])
        self._optimizer.param_groups[0]["params"] = []
        self._noise = torch.Generator().manual_seed(rng.randrange(2**31))
        self.active: list[Unit] = []
        self.next, self.steps = self.draw(), 0

    def draw(self) -> list[Unit]:
        layers = self.rng.sample(range(LAYERS), GAMMA)
        return [unit for unit in self.units if unit.always or unit.layer in layers]

    def switch(self) -> None:
        """As the engine does: mostly to what was announced, sometimes not (scores were refreshed meanwhile)."""
        self.active = self.next if self.rng.random() < 0.8 else self.draw()
        self.next = self.draw()
        self.store.plan(self.active)

    def step(self, interference: float = 0.0) -> None:
        """One optimizer step, skipped now and then as for gradients that are not finite."""
        gradients = {unit: torch.randn(unit.shard_numel, generator=self._noise) for unit in self.active}
        if self.rng.random() < 0.9:  # otherwise none was reduced before the end of backward
            for unit in self.active:
                self.store.prefetch(unit)
        if self.rng.random() < interference:
            self.interfere()
        if self.rng.random() < 0.8:
            self.steps += 1
            for unit in self.active:
                step_unit(unit, gradients[unit], 1.0, self._optimizer, self.store, self.steps)
                self.plain[unit].step(gradients[unit])
        self.store.end_step()

    def interfere(self) -> None:
        """Something from outside a step."""
        unit = self.rng.choice(self.units)
        plain = self.plain[unit]
        action = self.rng.choice(["put", "set", "drop", "flush", "read", "read"])
        if action == "drop":
            self.store.drop(unit)
            plain.forget()
        elif action == "flush":
            self.store.flush()
        elif action == "set" and plain.optimizer is not None:  # as safe_set_full_optimizer_state does
            state = self.store.ensure(unit)
            name = self.rng.choice(list(state.moments))
            state.moments[name].mul_(0.5)
            plain.state[name].mul_(0.5)
            self.store.put(unit, state)
        elif action == "put":  # as loading a checkpoint does, without reading what was there
            master = torch.randn(unit.shard_numel, generator=self._noise)
            self.store.put(unit, UnitState(master))
            plain.start(master)
            plain.step(torch.zeros_like(master))
            template = self.store.template(unit)
            state = {k: v for k, v in plain.state.items() if k in template.moments}
            scalars = {k: v for k, v in plain.state.items() if k not in template.moments}
            self.store.put(unit, UnitState(plain.master.detach().clone(), state, scalars))
            unit.shard.copy_(plain.weights)
        else:
            assert self.plain[unit].differs(self.store) is None, self.plain[unit].differs(self.store)

    @torch.no_grad()
    def play(self, periods: int, interference: float = 0.25) -> None:
        """Train for that many sampling periods of up to 3 steps each; raise at the first difference found."""
        for _ in range(periods):
            self.switch()
            steps = self.rng.randrange(1, 4)
            for number in range(steps):
                if number == steps - 1:
                    self.store.prepare(self.next)
                self.step(interference)
                if self.rng.random() < interference:
                    self.interfere()
        self.check()

    def check(self) -> None:
        """Compare everything."""
        found = [difference for plain in self.plain.values() if (difference := plain.differs(self.store))]
        assert not found, found


class SlowIO:
    """Block I/O that takes up to ``seconds``, at random, and lists in ``torn`` what changed while it was written."""

    def __init__(self, inner: BlockIO, seconds: float, torn: list[str] | None = None):
        self._inner, self._seconds, self._rng = inner, seconds, random.Random(0)
        self.torn = [] if torn is None else torn

    def read(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        time.sleep(self._rng.random() * self._seconds)
        self._inner.read(file, pieces)

    def write(self, file: StateFile, pieces: Sequence[Piece]) -> None:
        before = [piece.data.clone() for piece in pieces]
        time.sleep(self._rng.random() * self._seconds)
        self._inner.write(file, pieces)
        if not all(torch.equal(piece.data, old) for piece, old in zip(pieces, before, strict=True)):
            self.torn.append(file.path.name)

    def close(self) -> None:
        self._inner.close()


@contextmanager
def rig_of(
    offload: Mapping[str, Any],
    folder: Path,
    seed: int,
    *,
    copies: type[Copies] = Copies,
    parts: Mapping[str, Any] | None = None,
    wrap_io: Callable[[BlockIO], BlockIO] | None = None,
    make: MakeOptimizer = adamw,
) -> Iterator[Rig]:
    """A store as the engine would open it, with other ``copies`` or ``parts`` (names in ``build``)."""
    rng = random.Random(seed)
    units = make_units(rng)
    config = OffloadConfig(**{"nvme_path": str(folder), **offload})
    optimizer = make([nn.Parameter(torch.zeros(1))])
    template = learn_template(optimizer, optimizer.param_groups[0], torch.device("cpu"))
    open_io = build.open_io

    def open_wrapped_io(*arguments: Any) -> Callable[[], BlockIO]:
        factory = open_io(*arguments)
        return factory if wrap_io is None else lambda: wrap_io(factory())

    replaced = {"copies_for": lambda device, trace: copies(trace), "open_io": open_wrapped_io, **(parts or {})}
    job: dict[str, Any] = {"num_active_layers": GAMMA, "device": torch.device("cpu"), "rank": 0, "aio": {}}
    with mock.patch.multiple(build, **replaced):
        store = build.open_store(config, units, [template], **job)
    try:
        yield Rig(store, units, make, rng)
    finally:
        store.close()
