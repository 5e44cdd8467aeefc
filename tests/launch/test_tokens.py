import logging
from typing import Any

import datasets
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from launch.rows import Rows
from launch.template import IGNORED_LABEL, Template
from launch.tokens import Collator, tokenize

ROW = {"instruction": "What is 2 and 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}


def in_memory(*rows: dict[str, Any]) -> Rows:
    return Rows("memory", datasets.Dataset.from_list(list(rows)))


def trained_text(tokenizer: PreTrainedTokenizerFast, example: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED_LABEL]))


# ---- length ---------------------------------------------------------------------------------------------------------


def test_a_long_prompt_loses_its_start_and_keeps_the_answer(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = {**ROW, "instruction": "word " * 300}
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(in_memory(ROW, long), Template.choose(tokenizer), 64)
    assert "1 of 2 rows cut to 64 tokens: 1 lost the start of the prompt" in caplog.text
    assert len(tokens[1]["input_ids"]) == len(tokens[1]["labels"]) == 64
    assert trained_text(tokenizer, tokens[1]) == ROW["output"] + tokenizer.eos_token
    assert len(tokens[0]["input_ids"]) < 64


def test_a_long_answer_is_an_error_or_left_out(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = in_memory(ROW, {**ROW, "output": "word " * 300}, {**ROW, "output": "word " * 200})
    template = Template.choose(tokenizer)
    with pytest.raises(
        ValueError, match=r"2 of 3 answers are longer than --max_length 64, .* \(first: row 1, \d+ tokens\)"
    ):
        tokenize(rows, template, 64)
    with caplog.at_level(logging.WARNING):
        assert len(tokenize(rows, template, 64, "drop")) == 1
    assert "2 of 3 rows left out" in caplog.text
    with pytest.raises(ValueError, match="no row is left"):
        tokenize(in_memory(rows.rows[1]), template, 64, "drop")


def test_long_text_loses_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenize(in_memory({"text": "one two " * 100}), Template.choose(tokenizer), 16)
    assert tokens[0]["input_ids"] == tokens[0]["labels"] == tokenizer("one two " * 100)["input_ids"][:16]


def test_collator_pads_to_a_multiple_of_eight() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [9] * 9, "labels": [9] * 9}]
    batch = Collator(pad_token_id=7)(rows)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(batch, torch.Size([2, 16]))
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [7] * 13
    assert batch["labels"][0].tolist() == [-100, 6, 7] + [-100] * 13
    # The padding token occurs in the text: the mask goes by length, not by token.
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
