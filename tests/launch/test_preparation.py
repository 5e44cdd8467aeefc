"""What could only fail in the middle or at the end of a run is refused while launch/train.py prepares it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from helpers.programs import in_memory
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from launch import preparation
from launch.data.arithmetic import generate
from launch.data.chat_template import Template
from launch.data.preview import count_tokens
from launch.data.tokenization import tokenize


def options(model: Path, output: Path) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(model=str(model)),
        precision=SimpleNamespace(name="fp32"),
        training=SimpleNamespace(output_dir=str(output)),
        ds_config={},
        checkpoint=None,
        lora=lambda: None,
    )


@pytest.fixture
def task(tokenizer: PreTrainedTokenizerFast) -> preparation.Task:
    template, test = Template.choose(tokenizer), in_memory(generate("test", 3))
    rows, test_rows = tokenize(in_memory(generate("train", 5)), template, 512), tokenize(test, template, 512)
    return preparation.Task(tokenizer, template, rows, test, test_rows, "exact", count_tokens(rows), None)


@pytest.fixture
def small_vocabulary(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A model with fewer rows in its embedding than the tokenizer has tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_model_that_fits_is_prepared(model_folder: Path, task: preparation.Task, tmp_path: Path) -> None:
    model, probe_steps_within = preparation.prepare_model(options(model_folder, tmp_path / "out"), task)
    assert model.get_input_embeddings().weight.shape[0] == len(task.tokenizer)
    assert probe_steps_within(10) == 0


def test_tokens_of_the_data_beyond_the_embedding_are_refused(
    small_vocabulary: Path, task: preparation.Task, tmp_path: Path
) -> None:
    largest = max(token for row in task.train for token in row["input_ids"])
    assert largest >= 260
    with pytest.raises(ValueError, match=r"small: .*has 260 rows \(tokens 0 to 259\)"):
        preparation.prepare_model(options(small_vocabulary, tmp_path / "out"), task)
    assert not (tmp_path / "out").exists()
    # Those that do not occur do no harm.
    few = datasets.Dataset.from_dict({"input_ids": [[3, 259]], "labels": [[3, 259]]})
    task.train, task.test, task.test_tokens, task.measure = few, None, None, "none"
    preparation.prepare_model(options(small_vocabulary, tmp_path / "out"), task)
    task.test_tokens = datasets.Dataset.from_dict({"input_ids": [[3, 260]], "labels": [[3, 260]]})
    with pytest.raises(ValueError, match="holds token 260"):
        preparation.prepare_model(options(small_vocabulary, tmp_path / "out"), task)


def test_an_output_folder_that_is_a_file_is_refused(
    model_folder: Path, task: preparation.Task, tmp_path: Path
) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match=r"--output_dir .*/out: cannot be written"):
        preparation.prepare_model(options(model_folder, tmp_path / "out"), task)


def test_a_model_that_will_be_saved_in_another_form_is_announced(
    model_folder: Path, task: preparation.Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, gathering = options(model_folder, tmp_path / "out"), {"stage3_gather_16bit_weights_on_model_save": True}
    for zero, said in (({"stage": 3}, True), ({"stage": 3, **gathering}, False), ({"stage": 2}, False)):
        given.ds_config = {"zero_optimization": zero}
        preparation.prepare_model(given, task)
        assert ("will be saved as a DeepSpeed checkpoint" in capsys.readouterr().out) is said


@pytest.mark.parametrize("wanted", ["exact", "choice"])
def test_rows_without_an_answer_are_refused_for_a_task_that_needs_one(wanted: str) -> None:
    rows = in_memory([{"instruction": "Explain.", "output": "It is a thing."}])
    with pytest.raises(ValueError, match="memory: row 0 has no"):
        preparation.task_to_measure(wanted, rows)
    assert preparation.task_to_measure("auto", rows) == preparation.task_to_measure("loss", rows) == "loss"
    assert preparation.task_to_measure("none", rows) == "none"
