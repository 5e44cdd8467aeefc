# SPDX-License-Identifier: Apache-2.0
"""The command ``expand`` on a file of one rank; test_universal.py expands whole checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.state_rig import rig_of

from grass_ds.__main__ import main
from grass_ds.checkpoint import folder as folders
from grass_ds.checkpoint.expand import expand
from grass_ds.checkpoint.part import Part, SummedFile, write_summed
from grass_ds.checkpoint.state import GRASS, STORED
from grass_ds.core.deepspeed_compat import checkpoint_keys as keys
from grass_ds.offload.store import UnitState

FILE = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"


@contextmanager
def compact_checkpoint(tmp_path: Path) -> Iterator[tuple[Path, UnitState]]:
    """A checkpoint with one unit in 8 bits, and its state."""
    with rig_of({"device": "cpu", "state_format": "8bit"}, tmp_path, seed=1) as rig, torch.no_grad():
        rig.switch()
        unit = rig.active[0]
        rig.step()
        state, stored = rig.store.ensure(unit), rig.store.stored(unit)
        saved = {
            keys.ZERO_STAGE: 2,
            keys.BASE_OPTIMIZER_STATE: {"state": {0: dict(state.scalars)}},
            keys.SINGLE_PARTITION_OF_FP32_GROUPS: [unit.shard.clone()],
            GRASS: {"layout": [[unit.name, []]], STORED: {unit.name: stored}, "stepped": {unit.name: state.scalars}},
        }
        here = tmp_path / "here"
        here.mkdir()
        part = Part(0, 1, 2, 5, state_format="8bit")
        part.files[FILE] = write_summed({keys.OPTIMIZER_STATE_DICT: saved}, here / FILE)
        part.files["model.pt"] = write_summed({"weights": torch.ones(3)}, here / "model.pt")
        part.write(here)
        yield here, state


def test_states_become_fp32_and_the_rest_is_copied(tmp_path: Path) -> None:
    with compact_checkpoint(tmp_path) as (here, state):
        assert expand(here, tmp_path / "out") == 1
        assert not folders.problems(tmp_path / "out") and not folders.corrupt(tmp_path / "out")
        assert Part.read(tmp_path / "out", 0).state_format == "fp32"
        saved: dict[str, Any] = torch.load(tmp_path / "out" / FILE)[keys.OPTIMIZER_STATE_DICT]
        assert torch.equal(saved[keys.SINGLE_PARTITION_OF_FP32_GROUPS][0], state.master)
        found = saved[keys.BASE_OPTIMIZER_STATE]["state"][0]
        assert state.moments.keys() == {"exp_avg", "exp_avg_sq"}
        assert all(torch.equal(found[name], moment) for name, moment in state.moments.items())
        assert saved[GRASS][STORED] == {}
        assert expand(tmp_path / "out", tmp_path / "again") == 0  # nothing is compact, all is copied
        assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


def test_a_damaged_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of a tensor, which ``torch.load`` does not see."""
    with compact_checkpoint(tmp_path) as (here, _):
        content = bytearray((here / FILE).read_bytes())
        content[len(content) // 2] ^= 1
        (here / FILE).write_bytes(content)
        assert main(["expand", str(here), str(tmp_path / "out")]) == 1
        assert f"{FILE} is not what was written (checksum)" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def full(self: SummedFile, path: Path) -> None:
        opened(self, Path("/dev/full"))

    opened = SummedFile.__init__
    with compact_checkpoint(tmp_path) as (here, _):
        with mock.patch.object(SummedFile, "__init__", full):
            assert main(["expand", str(here), str(tmp_path / "out")]) == 1
        assert "No space left on device" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
