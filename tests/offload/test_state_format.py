# SPDX-License-Identifier: Apache-2.0
"""State formats in the store: what they take, what moves, and master weights that are set without the weights."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from helpers.small import planes
from helpers.state_rig import rig_of

from grass_ds.config import GrassConfigError, OffloadConfig
from grass_ds.offload.codecs import Bfloat16, Blocks, CutOff, Float32, NoMaster, WholeMaster
from grass_ds.offload.copies import Copies
from grass_ds.offload.state_format import choose_format
from grass_ds.offload.store import UnitState
from grass_ds.zero.step import step_unit

FORMATS = ("fp32", "exact", "bf16", "8bit")
ADAM = ("exp_avg", "exp_avg_sq")
CPU = {"device": "cpu", "chunk_numel": 1}


class CountedCopies(Copies):
    """Bytes of every copy, by direction."""

    moved: ClassVar[dict[str, int]] = {}

    def _copy(self, pairs: Any, after: Sequence[Any], lane: str, name: str) -> Any:
        pairs = list(pairs)
        self.moved[lane] += sum(source.nbytes for _, source in pairs)
        return super()._copy(pairs, after, lane, name)


def bytes_per_weight(name: str, dtype: torch.dtype) -> float:
    numel = 2**20
    return sum(plane.nbytes(numel) for plane in choose_format(name, ADAM, dtype).planes) / numel


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, (12, 10.125, 6.125, 4.15625)),
        (torch.float32, (12, 8, 4, 2.03125)),
        (torch.float16, (12, None, 8, 6.03125)),
    ],
)
def test_bytes_per_weight(dtype: torch.dtype, expected: tuple[float | None, ...]) -> None:
    """fp32 weights need no master weights beside them, fp16 weights need whole ones."""
    for name, nbytes in zip(FORMATS, expected, strict=True):
        if nbytes is None:
            with pytest.raises(GrassConfigError, match=r'state_format = "exact" with fp16 weights.*train in bf16'):
                choose_format(name, ADAM, dtype)
        else:
            assert bytes_per_weight(name, dtype) == nbytes


def test_an_optimizer_without_moments_keeps_its_master_weights() -> None:
    """Something must be stored, also where fp32 weights say it all."""
    assert isinstance(choose_format("exact", (), torch.float32).master, WholeMaster)
    assert isinstance(choose_format("exact", ("exp_avg",), torch.float32).master, NoMaster)


@pytest.mark.parametrize(("name", "codec"), [("bf16", Bfloat16), ("8bit", Blocks)])
def test_averages_are_compressed_and_nothing_else(name: str, codec: type) -> None:
    kept = choose_format(name, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"), torch.bfloat16)
    assert [type(one) for one in kept.moments] == [codec, codec, Float32, codec, Float32]
    if name == "8bit":  # their roots span half the magnitudes
        assert [one._root for one in kept.moments if isinstance(one, Blocks)] == [False, True, False]


@pytest.mark.parametrize("name", ["bf16", "8bit"])
def test_centred_rmsprop_is_that_of_fp32(name: str, tmp_path: Path) -> None:
    """It takes the root of the difference of two moments, which is below zero if they are rounded apart."""
    make = partial(torch.optim.RMSprop, lr=1e-3, centered=True)
    with rig_of({**CPU, "state_format": name}, tmp_path, seed=5, make=make) as rig:
        rig.play(periods=8)
        assert all(state.moments["grad_avg"].isfinite().all() for state in map(rig.store.ensure, rig.units))


@torch.no_grad()
def test_an_optimizer_that_counts_no_steps_rounds_anew_in_each(tmp_path: Path) -> None:
    """With the same random numbers in every step, an element that was rounded up once would stay where it is.

    A buffer of ones loses a thousandth per step, 0.13 to 0.26 of what bf16 resolves below 1.
    """
    make, steps = partial(torch.optim.SGD, lr=0.0, momentum=0.999), 200
    with rig_of({**CPU, "state_format": "bf16"}, tmp_path, seed=1, make=make) as rig:
        rig.switch()
        unit = rig.active[0]
        for step in range(steps + 1):
            gradient = torch.full((unit.shard_numel,), float(step == 0))
            step_unit(unit, gradient, 1.0, rig._optimizer, rig.store, step)
        buffer = rig.store[unit].moments["momentum_buffer"]
    # A step moves an element by -2^-8 or not at all, so its standard deviation is at most half of that.
    deviation = 2.0**-9 * steps**0.5
    assert (buffer - 0.999**steps).abs().max() < 6 * deviation
    assert buffer.unique().numel() > 2


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="state_format"):
        OffloadConfig(state_format="4bit")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_host_memory_and_copies_are_those_of_the_compact_form(name: str, tmp_path: Path) -> None:
    """Of units of any length; each step loads and stores the active ones, but for the first load of a unit."""
    CountedCopies.moved = {"load": 0, "store": 0}
    with rig_of({**CPU, "state_format": name}, tmp_path, seed=3, copies=CountedCopies) as rig:
        loaded = stored = 0
        seen: set[Any] = set()
        for _ in range(12):
            rig.switch()
            for unit in rig.active:
                step_unit(unit, torch.randn(unit.shard_numel), 1.0, rig._optimizer, rig.store, 1)
                stored += sum(planes(unit.shard_numel, name))
                loaded += sum(planes(unit.shard_numel, name)) if unit in seen else 0
                seen.add(unit)
            rig.store.end_step()
        assert seen == set(rig.units)
        assert CountedCopies.moved == {"load": loaded, "store": stored}
        assert rig.store.host_bytes == sum(sum(planes(unit.shard_numel, name)) for unit in rig.units)


@pytest.mark.parametrize("offload", [CPU, {"device": "none"}], ids=["cpu", "none"])
@torch.no_grad()
def test_master_weights_that_were_set_alone_are_used_and_kept_until_then(offload: Any, tmp_path: Path) -> None:
    """As by safe_set_full_fp32_param: the weights are others, and 17 bits say only what is cut off."""
    with rig_of({**offload, "state_format": "exact"}, tmp_path, seed=0) as rig:
        rig.switch()
        unit = rig.active[0]
        step_unit(unit, torch.randn(unit.shard_numel), 1.0, rig._optimizer, rig.store, 1)
        at_rest = rig.store.host_bytes
        master = torch.randn(unit.shard_numel)
        rig.store.put(unit, UnitState(master, {}, {"step": torch.tensor(3.0)}))
        assert torch.equal(rig.store[unit].master, master)
        assert rig.store.host_bytes == at_rest + master.nbytes
        kept = rig.store.stored(unit)
        assert kept is not None and torch.equal(kept["master"], master)
        with rig.store.moving(unit):  # they become the weights first
            assert torch.equal(unit.shard, master.to(torch.bfloat16))
        assert rig.store.host_bytes == at_rest
        assert torch.equal(rig.store[unit].master.to(torch.bfloat16), unit.shard)
        rig.store.put(unit, UnitState(master.mul_(2), {}, {"step": torch.tensor(3.0)}))
        step_unit(unit, torch.zeros(unit.shard_numel), 1.0, rig._optimizer, rig.store, 1)
        assert torch.allclose(rig.store[unit].master, master, rtol=2e-3)  # decayed by lr x weight decay = 1e-3
        assert rig.store.host_bytes == at_rest


@pytest.mark.parametrize("offload", [CPU, {"device": "none"}], ids=["cpu", "none"])
@pytest.mark.parametrize("name", ["exact", "8bit"])
@torch.no_grad()
def test_an_error_while_state_is_encoded_loses_no_bit_of_the_master_weights(
    offload: Any, name: str, tmp_path: Path
) -> None:
    """Neither weights nor what is stored beside them may be those of the failed step alone."""
    with rig_of({**offload, "state_format": name}, tmp_path, seed=0) as rig:
        rig.switch()
        unit = rig.active[0]
        step_unit(unit, torch.randn(unit.shard_numel), 1.0, rig._optimizer, rig.store, 1)
        weights, master = unit.shard.clone(), rig.store[unit].master.clone()
        failing = mock.patch.object(CutOff, "encode", side_effect=MemoryError)
        with failing, pytest.raises(MemoryError):
            step_unit(unit, torch.randn(unit.shard_numel), 1.0, rig._optimizer, rig.store, 1)
        assert torch.equal(unit.shard, weights)
        assert torch.equal(rig.store[unit].master, master)


@torch.no_grad()
def test_ties_survive_weights_that_move_and_a_checkpoint(tmp_path: Path) -> None:
    """The last bit of a master weight half-way between two weights is lost when it follows them, and stays so."""
    with rig_of({**CPU, "state_format": "exact"}, tmp_path, seed=0) as rig:
        rig.switch()
        unit = rig.active[0]
        tie = torch.tensor([0x3F808000], dtype=torch.int32).view(torch.float32)  # to 1.0, from above
        unit.shard.fill_(1.0)
        rig.store.put(unit, UnitState(tie.repeat(unit.shard_numel), {}, {"step": torch.tensor(1.0)}))
        with rig.store.moving(unit):
            unit.shard.fill_(1.0078125)  # an odd one: half a step above it is a tie that rounds up
        followed = rig.store[unit].master.clone()
        assert torch.equal(followed.to(torch.bfloat16), unit.shard)
        kept = rig.store.stored(unit)
        assert kept is not None and kept["master"] is None
        assert torch.equal(rig.store[unit].master, followed)
