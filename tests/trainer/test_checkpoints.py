# SPDX-License-Identifier: Apache-2.0
"""Which Trainer checkpoint a run resumes from, the warnings about the others, and which are removed. No engine."""

import io
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.utils import logger

import grass_ds
from grass_ds.checkpoint import folder as engine_parts
from grass_ds.checkpoint.part import Part, SummedFile
from grass_ds.trainer import checkpoints, retention
from grass_ds.trainer.checkpoints import sum_of, trainer_files, write_seal
from launch.resume import resume_point

RANKS = 2
WEIGHTS = b'{"w":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}'


def zipped(text: str) -> bytes:
    """What torch.save writes, as far as it matters here: an archive, whose directory is at its end."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data", text * 100)
    return buffer.getvalue()


def trainer_part(folder: Path, step: int, seal: bool = True) -> Path:
    """What the Trainer itself writes into ``checkpoint-<step>``."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(len(WEIGHTS).to_bytes(8, "little") + WEIGHTS + bytes(8))
    (checkpoint / "training_args.bin").write_bytes(zipped("args"))
    for rank in range(RANKS):
        (checkpoint / f"rng_state_{rank}.pth").write_bytes(zipped(f"{rank} at {step}"))
    (checkpoint / checkpoints.TRAINER_STATE).write_text(json.dumps({"global_step": step}))
    if seal:
        write_seal(checkpoint, {path.name: sum_of(path) for path in trainer_files(checkpoint)})
    return checkpoint


def engine_part(checkpoint: Path) -> Path:
    """What the engine publishes in it, later perhaps."""
    step = checkpoints.step_of(checkpoint)
    tag = f"global_step{step}"
    engine_parts.prepare(checkpoint, tag)
    aside = engine_parts.saving_path(checkpoint, tag)
    for rank in range(RANKS):
        part = Part(rank, RANKS, 2, step)
        with SummedFile(aside / f"optim_{rank}.pt") as file:
            file.write(zipped(f"state of {rank} at {step}"))
        part.files[f"optim_{rank}.pt"] = file.sums
        part.write(aside)
    engine_parts.publish(checkpoint, tag, latest=True)
    return checkpoint


def stock_part(checkpoint: Path) -> Path:
    """What plain DeepSpeed leaves: no parts, no checksums."""
    tag = checkpoint / f"global_step{checkpoints.step_of(checkpoint)}"
    tag.mkdir()
    for rank in range(RANKS):
        (tag / f"optim_{rank}.pt").write_bytes(zipped(f"state of {rank}"))
    (checkpoint / "latest").write_text(tag.name)
    return checkpoint


def saved(folder: Path, *steps: int, **how: bool) -> list[Path]:
    return [engine_part(trainer_part(folder, step, **how)) for step in steps]


def gone(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def cut(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:-9])


def flip(name: str) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        content = bytearray((checkpoint / name).read_bytes())
        content[len(content) // 2] ^= 1
        (checkpoint / name).write_bytes(content)

    return change


OPTIM = "global_step9/optim_1.pt"
# what a kill or a disk did to the newest checkpoint -> what is said of it
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "rng missing": (gone("rng_state_1.pth"), "rng_state_1.pth is missing"),
    "rng cut off": (cut("rng_state_1.pth"), "rng_state_1.pth has"),
    "rng flipped": (flip("rng_state_1.pth"), "rng_state_1.pth is not what was written (checksum)"),
    "weights cut off": (cut("model.safetensors"), "model.safetensors has"),
    "trainer state missing": (gone("trainer_state.json"), "trainer_state.json is missing"),
    "trainer state cut off": (cut("trainer_state.json"), "trainer_state.json has"),
    "seal cut off": (cut("grass_trainer.json"), "grass_trainer.json cannot be read"),
    "not published": (gone("latest"), "the engine's part was not published (latest is missing or empty)"),
    "optimizer missing": (gone(OPTIM), "global_step9: optim_1.pt is missing"),
    "optimizer cut off": (cut(OPTIM), "global_step9: optim_1.pt has"),
    "optimizer flipped": (flip(OPTIM), "global_step9: optim_1.pt is not what was written (checksum)"),
    "part missing": (gone("global_step9/grass_rank_1.json"), "global_step9: grass_rank_1.json is missing"),
}
# and without a seal, where files are judged by their form
UNSEALED: dict[str, tuple[Callable[[Path], None], str]] = {
    **{name: DAMAGE[name] for name in ("rng missing", "trainer state missing")},
    "rng cut off": (cut("rng_state_1.pth"), "rng_state_1.pth is cut off"),
    "weights cut off": (cut("model.safetensors"), "model.safetensors is cut off"),
    "weights empty": (lambda checkpoint: os.truncate(checkpoint / "model.safetensors", 0), "safetensors is cut off"),
    "trainer state cut off": (cut("trainer_state.json"), "trainer_state.json is cut off"),
}


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What DeepSpeed's logger says; threads of other libraries may have something to say as well."""
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("WARNING", logger.name)
    only_ours = logging.Filter(logger.name)
    caplog.handler.addFilter(only_ours)
    yield caplog
    caplog.handler.removeFilter(only_ours)


def check_damage(folder: Path, damage: Callable[[Path], None], said: str, warnings: pytest.LogCaptureFixture) -> None:
    """The newest of three checkpoints is damaged: it is passed over with a word, the one before is used."""
    newest, used = folder / "checkpoint-9", folder / "checkpoint-6"
    assert grass_ds.last_checkpoint(folder) == newest
    assert not warnings.messages
    damage(newest)
    assert grass_ds.last_checkpoint(folder) == used
    [message] = warnings.messages
    assert f"{newest} is not complete: " in message
    assert said in message
    assert message.endswith("; checkpoint-6 is used instead")


@pytest.mark.parametrize(
    ("seal", "case"),
    [*((True, case) for case in DAMAGE.items()), *((False, case) for case in UNSEALED.items())],
    ids=[*DAMAGE, *(f"no seal, {name}" for name in UNSEALED)],
)
def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, seal: bool, case: Any, warnings: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 6, 9, 3, seal=seal)
    check_damage(tmp_path, *case[1], warnings)


def test_a_run_of_plain_deepspeed_is_judged_by_its_form(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    for step in (3, 6, 9):
        stock_part(trainer_part(tmp_path, step, seal=False))
    check_damage(tmp_path, cut(OPTIM), "global_step9: optim_1.pt is cut off", warnings)


def test_what_is_no_checkpoint_is_no_candidate(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    assert grass_ds.last_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").touch()
    assert grass_ds.last_checkpoint(str(tmp_path)) is None
    assert not warnings.messages
    trainer_part(tmp_path, 100)  # still being written in the background
    assert grass_ds.last_checkpoint(tmp_path) is None
    assert warnings.messages[0].endswith("no earlier one is complete")
    saved(tmp_path, 9, 10)
    assert grass_ds.last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"


# ---- --resume_from_checkpoint ---------------------------------------------------------------------------------------


def test_true_means_the_newest_complete_one_or_the_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume_point("True", tmp_path) is None
    assert "starting from the beginning" in capsys.readouterr().out
    saved(tmp_path, 3)
    trainer_part(tmp_path, 6)
    assert resume_point("true", tmp_path) == str(tmp_path / "checkpoint-3")
    said = capsys.readouterr().out
    assert "checkpoint-6 is not complete: the engine's part was not published" in said
    assert resume_point("false", tmp_path) is resume_point(None, tmp_path) is None
    gone("trainer_state.json")(tmp_path / "checkpoint-3")
    assert resume_point("true", tmp_path) is None
    said = capsys.readouterr().out
    assert "checkpoint-6 is not" in said and "checkpoint-3 is not" in said and "from the beginning" in said


def test_a_given_folder_must_be_complete(tmp_path: Path) -> None:
    saved(tmp_path, 3, 6)
    assert resume_point(str(tmp_path / "checkpoint-3"), tmp_path / "elsewhere") == str(tmp_path / "checkpoint-3")
    gone("rng_state_0.pth")(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match=r"rng_state_0\.pth is missing; the newest complete one is .*checkpoint-3$"):
        resume_point(str(tmp_path / "checkpoint-6"), tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-99: .*there is no such folder"):
        resume_point(str(tmp_path / "checkpoint-99"), tmp_path)


# ---- save_total_limit -----------------------------------------------------------------------------------------------


def left(folder: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.checkpoints(folder)]


def kept(folder: Path, limit: int | None, step: int, best: int | None = None, at_end: bool = False) -> list[int]:
    name = None if best is None else f"elsewhere/checkpoint-{best}"
    removed = retention.surplus(folder, limit, step, name, at_end)
    return [step for step in left(folder) if folder / f"checkpoint-{step}" not in removed]


def test_the_limit_counts_complete_checkpoints(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4, 6, 8)
    assert kept(tmp_path, None, 8) == kept(tmp_path, 0, 8) == kept(tmp_path, 9, 8) == [2, 4, 6, 8]
    assert kept(tmp_path, 2, 8) == [6, 8]
    assert kept(tmp_path, 1, 8) == [8]
    under_way = trainer_part(tmp_path, 10)
    assert kept(tmp_path, 1, 10) == [8, 10]  # one more, until it is published
    cut("global_step6/optim_0.pt")(tmp_path / "checkpoint-6")
    assert kept(tmp_path, 2, 10) == [4, 8, 10]  # a torn one goes, and counts for nothing
    engine_part(under_way)
    assert kept(tmp_path, 1, 10) == [10]
    for step in (2, 4, 8, 10):
        gone("latest")(tmp_path / f"checkpoint-{step}")
    assert kept(tmp_path, 1, 10) == [2, 4, 6, 8, 10]  # nothing to fall back on: nothing goes


def test_the_best_stays_and_a_run_given_up_goes_first(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4, 6, 8)
    assert kept(tmp_path, 1, 8, best=4) == kept(tmp_path, 2, 8, best=4) == [4, 8]
    assert kept(tmp_path, 3, 8, best=2) == [2, 6, 8]
    assert kept(tmp_path, 1, 8, best=4, at_end=True) == [4]  # as the Trainer does
    assert kept(tmp_path, 1, 8, best=8, at_end=True) == [8]
    gone("latest")(tmp_path / "checkpoint-4")
    assert kept(tmp_path, 1, 8, best=4, at_end=True) == [8]
    # Resumed at 2, saved at 6: what is at 8 comes from before.
    assert kept(tmp_path, 1, 6) == [6]
    assert kept(tmp_path, 2, 6) == [2, 6]


@pytest.fixture
def args(tmp_path: Path) -> SimpleNamespace:
    return SimpleNamespace(output_dir=str(tmp_path), save_total_limit=2, should_save=True)


def test_a_removal_cut_off_leaves_nothing_that_looks_complete(
    tmp_path: Path, args: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(retention.shutil, "rmtree", lambda *_, **__: None)
        retention.remove_surplus(args, 1, 4, None)
    assert checkpoints.problems(tmp_path / "checkpoint-2") == ["trainer_state.json is missing"]
    retention.remove_surplus(args, 1, 4, None)
    assert left(tmp_path) == [4]


def test_what_the_trainer_would_count_is_removed_before_training(tmp_path: Path, args: SimpleNamespace) -> None:
    saved(tmp_path, 2, 4, 8)
    trainer_part(tmp_path, 3)
    trainer_part(tmp_path, 6)
    args.should_save = False
    retention.prepare_for_trainer(args, 4)
    assert left(tmp_path) == [2, 3, 4, 6, 8]
    args.should_save = True
    retention.prepare_for_trainer(args, 4)
    assert left(tmp_path) == [2, 4, 8]
    args.save_total_limit = 1
    with pytest.raises(ValueError, match=r"grass_ds\.attach\(trainer\)"):
        retention.prepare_for_trainer(args, 4)
