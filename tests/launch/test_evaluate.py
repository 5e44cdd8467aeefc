from typing import Any

import datasets
import pytest
import torch
from helpers import rounding
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from launch import distributed, evaluate
from launch.arithmetic import generate
from launch.evaluate import (
    _generate,
    choice_accuracy,
    choose_task,
    exact_match,
    mean_loss,
)
from launch.grading import _said, extract_number
from launch.model import largest_token_read
from launch.progress import Progress
from launch.rows import Rows
from launch.template import IGNORED_LABEL, Template
from launch.tokens import tokenize


def in_memory(rows: list[dict[str, Any]]) -> Rows:
    return Rows("memory", datasets.Dataset.from_list(rows))


ARC = {
    "instruction": "Choose: what is wet?\n\nAnswer1: fire Answer2: water\n\nAnswer format: answer1/answer2",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def final_answer(text: str) -> str:
    """The number that a text ends in, else its first sentence."""
    number = extract_number(text)
    return min(_said(text), key=len) if number is None else str(number)


def test_batched_generation_equals_one_by_one(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.choose(tokenizer)
    rows = generate("test", 6)
    expected = []
    for row in rows:
        ids = torch.tensor([template.prompt_ids(row)])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    progress, prompts = Progress("test", 6), [template.prompt_ids(row) for row in rows]
    assert _generate(model, template, prompts[:4], 12, progress) == expected[:4]
    assert progress.finished == 4
    assert _generate(model, template, prompts[4:], 12, progress) == expected[4:]
    assert progress.finished == 6
    # Each row's own continuation as its answer: all right. With one answer changed: all but one.
    answered = [{**row, "answer": final_answer(text)} for row, text in zip(rows, expected, strict=True)]
    assert len({row["answer"] for row in answered}) > 1
    assert exact_match(model, template, in_memory(answered), batch_size=4, max_new_tokens=12) == 1.0
    answered[2]["answer"] = "another"
    assert exact_match(model, template, in_memory(answered), batch_size=4, max_new_tokens=12) == pytest.approx(5 / 6)


def test_exact_match_needs_answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = in_memory([{"instruction": "a", "output": "3"}, {"instruction": "a", "output": "words"}])
    with pytest.raises(ValueError, match="memory: row 1 has no `answer`"):
        exact_match(model, Template.choose(tokenizer), rows)


def log_likelihood(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum())


@pytest.mark.parametrize("length_normalized", [False, True])
@torch.no_grad()
def test_choice_accuracy_equals_unbatched_likelihoods(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length_normalized: bool
) -> None:
    template = Template.choose(tokenizer)
    names = ["one", "many of them", "3"]
    rows = [
        {"instruction": f"{row['instruction']} Which?", "output": "It is one", "answer": "one", "choices": names}
        for row in generate("train", 9)
    ]
    best = []
    for row in rows:
        answers = [template.answer_ids(f"It is {name}") for name in names]
        scores = [log_likelihood(model, template.prompt_ids(row), answer) for answer in answers]
        if length_normalized:
            scores = [score / len(answer) for score, answer in zip(scores, answers, strict=True)]
        best.append(names[scores.index(max(scores))])
    likeliest = [{**row, "answer": name, "output": f"It is {name}"} for row, name in zip(rows, best, strict=True)]
    arguments = {"batch_size": 4, "length_normalized": length_normalized}
    assert choice_accuracy(model, template, in_memory(likeliest), **arguments) == 1.0
    other = {"one": "3", "many of them": "3", "3": "one"}
    wrong = [
        {**row, "answer": other[name], "output": f"It is {other[name]}"} for row, name in zip(rows, best, strict=True)
    ]
    assert choice_accuracy(model, template, in_memory(wrong), **arguments) == 0.0


def test_choice_needs_its_answer_among_the_options(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="row 0 has no options with its answer 'answer9'"):
        choice_accuracy(model, Template.choose(tokenizer), in_memory([{**ARC, "answer": "answer9"}]))


@torch.no_grad()
def losses_of(model: LlamaForCausalLM, template: Template, rows: Rows) -> tuple[float, int, float]:
    """Mean loss over all answer tokens of a float64 model, how many they are, and how far off a mean in float32 may be, relative."""
    exact = rounding.wide(model)
    total, count, noise = 0.0, 0, 0.0
    for row in rows.rows:
        ids, labels = (torch.tensor([part]) for part in template.encode(row))
        answers = int((labels != IGNORED_LABEL).sum())
        true = float(exact(ids, labels=labels).loss)
        noise = max(noise, abs(float(model(ids, labels=labels).loss) / true - 1))
        total, count = total + true * answers, count + answers
    # How rows are padded and batched changes the sums: another draw of a row's noise. Losses of up to `count` tokens are summed in float32.
    tolerance = rounding.DRAWS * noise + count * rounding.ROUNDOFF
    assert tolerance < 0.01 / count  # a token left out or a row counted twice is far more
    return total / count, count, tolerance


def test_loss_is_the_mean_over_answer_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    template, rows = Template.choose(tokenizer), in_memory(generate("test", 7))
    expected, _, tolerance = losses_of(model, template, rows)
    found = mean_loss(model, template, list(tokenize(rows, template, 512)), batch_size=3)
    assert found == pytest.approx(expected, rel=tolerance)


def test_ranks_share_the_rows_and_agree(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = Template.choose(tokenizer)
    rows = in_memory(generate("test", 7))
    expected, tokens, tolerance = losses_of(model, template, rows)
    examples = list(tokenize(rows, template, 512))
    parts: list[list[float]] = []
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: parts.append(list(values)) or values)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mean_loss(model, template, examples)
    assert all(count > 0 for _, count in parts)
    losses, counts = (sum(column) for column in zip(*parts, strict=True))
    assert counts == tokens
    assert losses / counts == pytest.approx(expected, rel=tolerance)


def test_training_mode_is_restored(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.choose(tokenizer)
    model.train()
    mean_loss(model, template, list(tokenize(in_memory(generate("test", 2)), template, 512)))
    assert model.training
    model.eval()


def test_ranks_of_a_whole_model_do_not_wait_for_each_other(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that has no rows is done at once: one that waited for it in the batches would wait for ever."""
    monkeypatch.setattr(distributed, "max_over_ranks", lambda _: pytest.fail("a collective that not all ranks enter"))
    assert list(evaluate._batches(model, [1, 2, 3], 2)) == [([1, 2], True), ([3], True)]
    assert list(evaluate._batches(model, [], 2)) == []


def test_ranks_of_a_partitioned_model_run_as_many_batches(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "is_partitioned", lambda _: True)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda mine: max(mine, 3.0) if mine else 0.0)
    expected = [([1, 2], True), ([3], True), ([1, 2], False)]
    assert list(evaluate._batches(model, [1, 2, 3], 2)) == expected
    monkeypatch.setattr(distributed, "max_over_ranks", lambda mine: max(mine, 1.0))
    with pytest.raises(ValueError, match="fewer rows than ranks"):
        list(evaluate._batches(model, [], 2))


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_says_why_auto_takes_the_loss(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    prose = {"instruction": "Explain.", "output": "There are 3 reasons.", "answer": None}
    assert choose_task("auto", in_memory(generate("test", 3))) == "exact"
    assert capsys.readouterr().out == ""
    assert choose_task("auto", in_memory([*generate("test", 3), prose])) == "loss"
    assert capsys.readouterr().out.startswith("measuring the loss only: 3 of 4 rows have" if rank == 0 else "")
    assert choose_task("loss", in_memory([prose])) == "loss"
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="memory: row 1 has no options"):
        choose_task("choice", in_memory([ARC, generate("test", 1)[0]]))


def test_prompts_count_among_the_tokens_that_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    template, rows = Template.choose(tokenizer), in_memory(generate("test", 3))
    expected = max(token for row in rows.rows for token in template.prompt_ids(row))
    assert largest_token_read(template, rows, "exact") == largest_token_read(template, rows, "choice") == expected
    assert largest_token_read(template, rows, "loss") == 0
