import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch import distributed
from launch.model import load, load_model
from launch.saving import check_space, make_savable, rehearse_saving


def with_generation_config(model_folder: Path, folder: Path, **values: Any) -> Path:
    """A copy of a model, with more values in its generation_config.json."""
    shutil.copytree(model_folder, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


TWO = {"temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("values", "saved", "warning"),
    [
        (TWO, {**TWO, "do_sample": True}, "temperature: 0.6, top_p: 0.9"),
        ({"top_k": 20}, {"top_k": 20, "do_sample": True}, "top_k: 20"),
        ({"temperature": 0.6, "do_sample": False}, {}, "temperature: 0.6"),
        ({"temperature": 0.0}, {}, "temperature: 0.0"),
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}, ""),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 50, "do_sample": False}, {}, ""),
        ({}, {}, ""),
    ],
)
def test_a_generation_config_that_could_not_be_saved_is_mended(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, values: Any, saved: Any, warning: str
) -> None:
    folder = with_generation_config(model_folder, tmp_path / "model", **values)
    with caplog.at_level(logging.WARNING, "launch.saving"):
        model, _ = load(str(folder), "fp32")
    assert ("sets " + warning if warning else "") in caplog.text
    assert len([record for record in caplog.records if record.name == "launch.saving"]) == bool(warning)
    model.save_pretrained(tmp_path / "saved")
    file = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert {key: file[key] for key in saved} == saved
    assert bool(again.do_sample) == bool(saved.get("do_sample"))
    if not saved.get("do_sample"):
        assert again.temperature in (None, 1.0)
        assert again.top_p in (None, 1.0)


def test_only_rank_0_warns(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    config = GenerationConfig(temperature=0.6)
    make_savable(config, "m")
    assert config.do_sample is True
    assert not caplog.records


def test_what_else_is_wrong_is_said_in_the_words_of_transformers() -> None:
    for key, value in (("num_return_sequences", 3), ("length_penalty", 2.0), ("max_new_tokens", -1)):
        config = GenerationConfig()
        setattr(config, key, value)
        with pytest.raises(ValueError, match=f"--model m: generation_config.json could not be saved (?s:.*){key}"):
            make_savable(config, "m")


def test_saving_is_rehearsed_without_a_trace(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rehearse_saving(model, tokenizer, tmp_path / "new" / "out")
    assert list((tmp_path / "new" / "out").iterdir()) == []
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(ValueError, match=f"--output_dir {folder}: cannot be written"):
            rehearse_saving(model, tokenizer, folder)


def test_a_part_that_cannot_be_saved_is_named(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = load_model(str(model_folder), "fp32", tokenizer)
    model.config.own = object()
    with pytest.raises(ValueError, match=r"the model's config cannot be saved.*TypeError"):
        rehearse_saving(model, tokenizer, tmp_path)


def test_a_file_system_without_room_is_warned_of(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    for free, earlier, warnings in ((needed, 0, 0), (needed - 1, 0, 1), (needed - 1, 1, 0)):
        (tmp_path / "model.safetensors").write_bytes(b"." * earlier)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        caplog.clear()
        check_space(model, tmp_path)
        assert len(caplog.records) == warnings
