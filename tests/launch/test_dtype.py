"""Which precision launch/train.py and launch/evaluate.py take, and that the shipped configurations leave it open."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from grass_ds import precision
from launch import arguments, distributed, dtype

ROOT = Path(__file__).resolve().parents[2]
OPEN: dict[str, Any] = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
UNSAID: dict[str, bool | None] = {"bf16": None, "fp16": None}
DEVICES = {
    "fp32": {"bf16": 1.5, "fp32": 20.0},
    "bf16": {"bf16": 86.0, "fp32": 158.0},
    "fp16": {"bf16": 9e3, "fp16": 100e3, "fp32": 14e3},
}


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that computes the precision of this name."""
    name = request.param if hasattr(request, "param") else "fp32"
    known = {**DEVICES[name], "fp16": DEVICES[name].get("fp16", 5.0)}

    def measure(names: Collection[str] = ()) -> precision.Rates:
        return precision.Rates({key: rate for key, rate in known.items() if key in {*DEVICES[name], *names}})

    monkeypatch.setattr(precision, "measure", measure)
    return name


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_the_hardware_decides_what_is_left_open(device: str) -> None:
    choice = dtype.choose_for_training(OPEN, UNSAID, None)
    assert (choice.name, choice.reason) == (device, "by what the hardware computes")
    assert dtype.choose("auto").name == device
    assert str(choice).startswith(f"{device}, by what the hardware computes (bf16 matrix products at ")
    assert choice.as_dict()["gflops"]["fp32"] == DEVICES[device]["fp32"]


# configuration, --bf16 and --fp16, what a device that computes bf16 trains in, a part of the reason
ASKED: list[tuple[dict[str, Any], dict[str, bool | None], str, str]] = [
    (OPEN, {"bf16": True, "fp16": None}, "bf16", "--bf16"),
    (OPEN, {"bf16": None, "fp16": True}, "fp16", "--fp16"),
    (OPEN, {"bf16": False, "fp16": None}, "fp32", "hardware"),
    (OPEN, {"bf16": False, "fp16": False}, "fp32", "no other"),
    ({"bf16": {"enabled": True}}, UNSAID, "bf16", "configuration"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}, UNSAID, "bf16", "configuration"),
    ({"bfloat16": {"enabled": True}}, UNSAID, "bf16", "configuration"),
    ({"fp16": {"enabled": True}}, UNSAID, "fp16", "configuration"),
    ({"bf16": {"enabled": False}}, UNSAID, "fp32", "no other"),
    ({}, UNSAID, "fp32", "no other"),
]


@pytest.mark.parametrize("device", ["bf16"], indirect=True)
@pytest.mark.parametrize(("config", "options", "name", "reason"), ASKED, ids=str)
def test_what_somebody_asked_for_is_obeyed(
    device: str, config: dict[str, Any], options: dict[str, bool | None], name: str, reason: str
) -> None:
    choice = dtype.choose_for_training(config, options, None)
    assert choice.name == name
    assert reason in choice.reason


def test_a_precision_that_the_configuration_has_no_block_for_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r'--bf16 true: .* no "bf16" block.*"enabled": "auto"'):
        dtype.choose_for_training({}, {"bf16": True, "fp16": None}, None)


def test_a_resumed_run_keeps_its_precision_on_another_machine(device: str, tmp_path: Path) -> None:
    for key in ("dtype", "torch_dtype"):
        (tmp_path / "config.json").write_text(json.dumps({key: "bfloat16"}))
        choice = dtype.choose_for_training(OPEN, UNSAID, str(tmp_path))
        assert choice.name == "bf16" and str(tmp_path) in choice.reason
    assert dtype.choose_for_training(OPEN, {"bf16": False, "fp16": None}, str(tmp_path)).name == "fp32"
    (tmp_path / "config.json").unlink()
    assert dtype.choose_for_training(OPEN, UNSAID, str(tmp_path)).name == device


@pytest.mark.parametrize("device", ["bf16"], indirect=True)
def test_what_one_rank_emulates_the_run_cannot_use(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rates of one rank, not the lowest of each dtype: 20 and 40 would look like hardware that computes bf16."""
    others = [precision.Rates({"bf16": 20.0, "fp32": 40.0}), precision.Rates({"bf16": 30.0, "fp32": 142.0})]
    monkeypatch.setattr(distributed, "gather", lambda task: [task(), *others])
    assert dtype.measured() == others[1]


def train_in(checkpoint: str | None) -> tuple[str, dict[str, float]]:
    """Rank 1 does not see the checkpoint."""
    import torch.distributed as dist

    found = dtype.choose_for_training(OPEN, UNSAID, checkpoint if dist.get_rank() == 0 else None)
    return found.name, dict(found.rates.gflops)


@pytest.mark.dist
def test_ranks_agree(two_ranks: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "float16"}))
    for checkpoint in (str(tmp_path), None):
        mine, theirs = two_ranks.run(train_in, checkpoint=checkpoint)
        assert mine == theirs
        assert (mine[0] == "fp16") == (checkpoint is not None)


def test_names_of_evaluate(device: str) -> None:
    assert [dtype.choose(name).name for name in ("bf16", "bfloat16", "float32")] == ["bf16", "bf16", "fp32"]
    with pytest.raises(ValueError, match="--dtype 'half': choose one of auto, bf16, fp16, fp32"):
        dtype.choose("half")


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_the_command_line_hands_the_choice_to_the_trainer(device: str, tmp_path: Path, without_ranks: None) -> None:
    """Every shipped configuration, without a word about precision."""
    for file in sorted((ROOT / "ds_configs").glob("*.json")):
        parsed = arguments.parse(["--deepspeed", str(file), "--output_dir", str(tmp_path)])
        assert parsed.precision.name == device
        assert (parsed.training.bf16, parsed.training.fp16) == (device == "bf16", device == "fp16"), file
        filled = parsed.training.hf_deepspeed_config.config
        assert (filled["bf16"]["enabled"], filled["fp16"]["enabled"]) == (device == "bf16", device == "fp16"), file
