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


# ---- prompts and labels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_only_the_answer_is_trained_on(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    template = Template.choose(tokenizer, kind)
    ids, labels = template.encode(ROW)
    prompt = template.prompt_ids(ROW)
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [IGNORED_LABEL] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert tokenizer.decode(ids[len(prompt) :]) == ROW["output"] + tokenizer.eos_token
    assert ROW["instruction"] in tokenizer.decode(prompt)
    assert ROW["output"] not in tokenizer.decode(prompt)


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_every_turn_of_the_assistant_is_trained_on(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    template = Template.choose(tokenizer, kind)
    ids, labels = template.encode(row)
    eos = tokenizer.eos_token
    assert tokenizer.decode([label for label in labels if label != IGNORED_LABEL]) == f"1{eos}2{eos}"
    whole = template.render(row["messages"], add_generation_prompt=False).rstrip()
    assert tokenizer.decode(ids) == whole


def test_text_is_trained_on_as_a_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = Template.choose(tokenizer).encode({"text": "A tale of two layers."})
    assert ids == labels
    assert tokenizer.decode(ids) == "A tale of two layers." + tokenizer.eos_token


def test_input_is_part_of_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Template.choose(tokenizer).prompt_ids({**ROW, "input": "A hint."})
    assert "What is 2 and 3?\n\nA hint." in tokenizer.decode(prompt)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    class Rewriting(Template):
        def render(self, messages: Any, add_generation_prompt: bool) -> str:
            return f"{len(messages)} turns: " + super().render(messages, add_generation_prompt)

    with pytest.raises(ValueError, match=r"rewrites earlier turns.*--template plain"):
        Rewriting(tokenizer, chat=True).encode(ROW)


def test_template_choice(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Template.choose(tokenizer).chat
    assert not Template.choose(tokenizer, "plain").chat
    with pytest.raises(ValueError, match="unknown template"):
        Template.choose(tokenizer, "fancy")


# ---- length ---------------------------------------------------------------------------------------------------------


def test_a_long_prompt_loses_its_start_and_keeps_the_answer(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    long = {**ROW, "instruction": "word " * 300}
    with caplog.at_level(logging.WARNING):
        tokens = tokenize(in_memory(ROW, long), Template.choose(tokenizer), 64)
    assert "1 of 2 rows cut to 64 tokens" in caplog.text
    assert len(tokens[1]["input_ids"]) == len(tokens[1]["labels"]) == 64
    assert trained_text(tokenizer, tokens[1]) == ROW["output"] + tokenizer.eos_token
    assert len(tokens[0]["input_ids"]) < 64


def test_a_long_answer_is_an_error_or_left_out(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = in_memory(ROW, {**ROW, "output": "word " * 300}, {**ROW, "output": "word " * 200})
    template = Template.choose(tokenizer)
    with pytest.raises(
        ValueError, match=r"2 of 3 answers are longer than --max_length 64 \(first: row 1, \d+ tokens\)"
    ):
        tokenize(rows, template, 64)
    with caplog.at_level(logging.WARNING):
        assert len(tokenize(rows, template, 64, "drop")) == 1
    assert "2 of 3 rows left out" in caplog.text
    with pytest.raises(ValueError, match="no row is left"):
        tokenize(in_memory(rows.rows[1]), template, 64, "drop")


def test_an_answer_of_exactly_the_length_fits(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.choose(tokenizer)
    _, labels = template.encode(ROW)
    answer = sum(label != IGNORED_LABEL for label in labels)
    assert len(tokenize(in_memory(ROW), template, answer)) == 1
    with pytest.raises(ValueError, match="1 of 1 answers"):
        tokenize(in_memory(ROW), template, answer - 1)


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
