import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from helpers import programs, tokenizers
from transformers import PreTrainedTokenizerFast

from launch import distributed
from launch.data import tokenization
from launch.data.chat_template import IGNORED_LABEL, Template
from launch.data.rows import Rows
from launch.data.sources import load_splits
from launch.data.tokenization import Collator, tokenize

ROW = {"instruction": "What is 2 and 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}


def in_memory(*rows: dict[str, Any]) -> Rows:
    return programs.in_memory(rows)


def trained_text(tokenizer: PreTrainedTokenizerFast, example: dict[str, list[int]]) -> str:
    return str(tokenizer.decode([label for label in example["labels"] if label != IGNORED_LABEL]))


# ---- length ---------------------------------------------------------------------------------------------------------


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


def test_collator_pads_to_a_multiple_of_eight() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [9] * 9, "labels": [9] * 9}]
    batch = Collator(pad_token_id=7)(rows)
    assert {key: value.shape for key, value in batch.items()} == dict.fromkeys(batch, torch.Size([2, 16]))
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [7] * 13
    assert batch["labels"][0].tolist() == [-100, 6, 7] + [-100] * 13
    # The padding token occurs in the text: the mask goes by length, not by token.
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]


# ---- what a cut keeps -----------------------------------------------------------------------------------------------

LLAMA3 = tokenizers.byte_level(tokenizers.LLAMA3, bos="<|begin|>", eos="<|eot_id|>")
LLAMA2 = tokenizers.sentencepiece(tokenizers.LLAMA2)


def turns(*contents: str, system: str = "") -> dict[str, Any]:
    """A conversation of user and assistant in turn, behind a system prompt if there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return {"messages": messages}


@pytest.mark.parametrize(
    "tokenizer", [LLAMA3, LLAMA2], ids=["system in a turn of its own", "system in the user's turn"]
)
def test_a_cut_prompt_keeps_beginning_system_prompt_and_openings(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """It is what the tokenizer makes of the conversation whose prompt has lost its start."""
    row = turns("0123456789" * 5, "Paris", system="Be brief.")
    template = Template.choose(tokenizer)
    length = len(template.encode(row)[0])
    for cut in (1, 13, 49):
        with caplog.at_level(logging.WARNING):
            found = tokenize(in_memory(row, turns("a", "b")), template, length - cut)
        assert f"1 of 2 rows cut to {length - cut} tokens: 1 lost the start of the prompt" in caplog.text
        expected = template.encode(turns(("0123456789" * 5)[cut:], "Paris", system="Be brief."))
        assert (found[0]["input_ids"], found[0]["labels"]) == expected
    with pytest.raises(ValueError, match="1 of 1 answers are longer than"):
        tokenize(in_memory(row), template, length - 51)


def test_a_plain_prompt_keeps_beginning_and_system_prompt() -> None:
    tokenizer = tokenizers.sentencepiece(None)
    template = Template.choose(tokenizer)
    row = turns("0123456789", "Paris", system="Be brief.")
    found = tokenize(in_memory(row), template, len(template.encode(row)[0]) - 4)[0]
    text = tokenizer.decode(found["input_ids"], skip_special_tokens=False)
    # The space behind "User:" is a token with the first character and goes with it, or it is one of its own and stays.
    assert text.replace("User: ", "User:") == "<s> System: Be brief.\n\nUser:456789\n\nAssistant: Paris</s>"


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_long_conversation_loses_its_earlier_turns_first(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """As few as will do, and whole: what is left is the tokenizer's rendering of the shorter conversation."""
    template = Template.choose(LLAMA3, kind)
    contents = [f"{name}{i}" for i in range(5) for name in ("question", "answer")]
    whole = turns(*contents, system="Be brief.")
    lengths = [len(template.encode(turns(*contents[2 * lost :], system="Be brief."))[0]) for lost in range(5)]
    for lost in range(5):
        expected = template.encode(turns(*contents[2 * lost :], system="Be brief."))
        for limit in {lengths[lost], lengths[lost - 1] - 1 if lost else 10_000}:
            found = tokenize(in_memory(whole), template, limit)[0]
            assert (found["input_ids"], found["labels"]) == expected
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        tokenize(in_memory(whole), template, lengths[4] - 1)
    assert "1 lost earlier turns, 1 lost the start of the prompt" in caplog.text


def test_a_default_system_prompt_is_kept() -> None:
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
    tokenizer = tokenizers.byte_level(default + tokenizers.CHATML)
    template = Template.choose(tokenizer)
    row = turns("0123456789", "Paris")
    found = tokenize(in_memory(row), template, len(template.encode(row)[0]) - 3)[0]
    assert tokenizer.decode(found["input_ids"]).startswith(
        "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n3456"
    )


def test_the_steps_of_a_turn_are_kept_whole() -> None:
    """A tool was called, and its result came: a cut through either would leave something that nobody writes."""
    row = turns("0123456789", "Let me see.")
    row["messages"] += [{"role": "tool", "content": "21"}, {"role": "assistant", "content": "It is 21."}]
    template = Template.choose(LLAMA3)
    length = len(template.encode(row)[0])
    found = tokenize(in_memory(row), template, length - 9)[0]
    assert LLAMA3.decode(found["input_ids"]) == LLAMA3.decode(template.encode(row)[0]).replace("012345678", "")
    assert trained_text(LLAMA3, found) == "Let me see.<|eot_id|>It is 21.<|eot_id|>"
    with pytest.raises(ValueError, match="1 of 1 answers are longer"):
        tokenize(in_memory(row), template, length - 11)


def test_nothing_is_cut_of_a_conversation_that_begins_with_its_answer() -> None:
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "0123456789"}]}
    template = Template.choose(LLAMA3)
    length = len(template.encode(row)[0])
    assert len(tokenize(in_memory(row), template, length)[0]["input_ids"]) == length
    with pytest.raises(ValueError, match="1 of 1 answers are longer"):
        tokenize(in_memory(row), template, length - 1)


def test_long_text_keeps_its_beginning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = tokenize(in_memory({"text": "the capital " * 9}, {"text": "is"}), Template.choose(LLAMA2), 8)
    assert found[0]["input_ids"] == LLAMA2("the capital " * 9)["input_ids"][:8]
    assert found[0]["labels"][1:] == found[0]["input_ids"][1:]
    assert found[1]["input_ids"] == [*LLAMA2("is")["input_ids"], LLAMA2.eos_token_id]
    assert "1 of 2 rows cut to 8 tokens: 1 lost the end of the text" in caplog.text


def test_long_rows_are_dropped_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    long_prompt, long_answer = turns("word " * 30, "a"), turns("a", "word " * 30)
    rows, template = in_memory(turns("a", "b"), long_prompt, long_answer), Template.choose(LLAMA3)
    with caplog.at_level(logging.WARNING):
        kept = tokenize(rows, template, 80, on_long_row="drop")
    assert [row["input_ids"] for row in kept] == [template.encode(turns("a", "b"))[0]]
    assert "2 of 3 rows left out, row too long" in caplog.text
    assert "cut" not in caplog.text
    with pytest.raises(ValueError, match=r"memory: 2 of 3 rows are longer than --max_length 80 \(first: row 1, \d+"):
        tokenize(rows, template, 80, "drop", on_long_row="error")
    with pytest.raises(ValueError, match=r"1 of 3 answers are longer than .*first: row 2"):
        tokenize(rows, template, 80)
    with pytest.raises(ValueError, match="unknown on_long_row 'keep': choose cut, drop or error"):
        tokenize(rows, template, 80, on_long_row="keep")


# ---- what is told, and cached ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [None, 2])
def test_a_row_that_the_template_refuses_is_named(monkeypatch: pytest.MonkeyPatch, processes: int | None) -> None:
    """Also where other processes do the work."""
    monkeypatch.setattr(tokenization, "_PARALLEL_FROM_ROWS", 1 if processes else 10**9)
    template = Template.choose(tokenizers.byte_level(tokenizers.GEMMA, bos="<bos>", eos="<eos>"))
    good, bad = turns("u", "a"), turns("u", "a", system="s")
    expected = r"^memory: row 2: the chat template refuses .*: Conversation roles must alternate.* \(2 of 4 rows"
    with pytest.raises(ValueError, match=expected):
        tokenize(in_memory(good, good, bad, bad), template, 512)
    assert len(tokenize(in_memory(good, good, good), template, 512)) == 3


def refused(file: str) -> str:
    """What every rank is told when it tokenizes a file that the template refuses."""
    datasets.config.HF_DATASETS_CACHE = Path(file).parent / "datasets"
    rows = load_splits(file)["train"]
    template = Template.choose(tokenizers.byte_level(tokenizers.GEMMA, bos="<bos>", eos="<eos>"))
    with pytest.raises(distributed.AgreedError) as told:
        distributed.on_every_rank(lambda: tokenize(rows, template, 512))
    return str(told.value)


@pytest.mark.dist
def test_every_rank_is_told_of_the_row_that_the_template_refuses(two_ranks: Any, tmp_path: Path) -> None:
    """A rank that broke would leave the other one waiting."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (turns("u", "a"), turns("u", "a", system="s"))))
    messages = two_ranks.run(refused, file=str(file))
    assert messages[0] == messages[1]
    assert messages[0].startswith(
        f"{file}: row 1 (line 2): the chat template refuses the conversation: Conversation roles must"
    )


def test_a_row_is_named_as_it_is_counted_in_its_file(tmp_path: Path) -> None:
    """Also where it is held out, or stands in one file of several."""
    template = Template.choose(tokenizers.byte_level(tokenizers.GEMMA, bos="<bos>", eos="<eos>"))
    good, bad, long = turns("u", "a"), turns("u", "a", system="s"), turns("u", "a" * 99)
    held = tmp_path / "held.jsonl"
    held.write_text("\n" + "".join(json.dumps(row) + "\n" for row in [good] * 95 + [bad] + [good] * 4))
    test = load_splits(str(held))["test"]
    for rows in (test, test.take(8)):
        with pytest.raises(ValueError, match=rf"^{held}: row 95 \(line 97\): the chat template refuses"):
            tokenize(rows, template, 512)
    parts = tmp_path / "parts"
    parts.mkdir()
    for index, row in enumerate((good, bad, long)):
        (parts / f"train-{index}-of-3.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    train = load_splits(str(parts))["train"]
    with pytest.raises(
        ValueError, match=rf"^{parts}/train-1-of-3\.jsonl: row 1 \(line 2\): the chat template refuses"
    ):
        tokenize(train, template, 512)
    only_long = replace(train, rows=train.rows.select([0, 5]))
    with pytest.raises(ValueError, match=rf"1 of 2 .*\(first: {parts}/train-2-of-3\.jsonl: row 1 \(line 2\), \d+ tok"):
        tokenize(only_long, template, 64)


def test_turns_that_are_not_trained_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    template = Template.choose(tokenizers.byte_level(tokenizers.REASONING))
    with caplog.at_level(logging.WARNING):
        tokenize(in_memory(turns("a", "b"), turns("a", "b", "c", "d")), template, 512)
    assert "memory: in 1 of 2 rows earlier answers are not trained" in caplog.text


def test_cached_tokens_are_those_of_these_settings(tmp_path: Path) -> None:
    """Another template, tokenizer or length gives other tokens, also where the rows were cached before."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(turns("0123456789" * 9, "Paris")))
    rows = load_splits(str(tmp_path / "rows.jsonl"))["train"]

    def made(tokenizer: PreTrainedTokenizerFast, kind: str = "auto", length: int = 512) -> tuple[list[int], list[int]]:
        row = tokenize(rows, Template.choose(tokenizer, kind), length)[0]
        return row["input_ids"], row["labels"]

    chatml = tokenizers.byte_level(tokenizers.CHATML)
    others = [
        tokenizers.byte_level(tokenizers.CHATML),
        tokenizers.byte_level(tokenizers.REASONING),
        tokenizers.byte_level(tokenizers.CHATML, eos="<eos>"),
        tokenizers.byte_level(tokenizers.LLAMA3, bos="<bos>"),
        tokenizers.byte_level(tokenizers.CHATML, merges=(("a", "r"),)),
        LLAMA2,
    ]
    for _ in range(2):
        for tokenizer in (chatml, *others):
            assert made(tokenizer) == Template.choose(tokenizer).encode(rows.rows[0])
        assert made(chatml, "plain") == Template.choose(chatml, "plain").encode(rows.rows[0])
        assert len(made(chatml, length=64)[0]) == 64
