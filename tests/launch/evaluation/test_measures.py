import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import rounding
from helpers.programs import in_memory
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from launch import distributed, evaluate
from launch.data.arithmetic import generate
from launch.data.chat_template import IGNORED_LABEL, Template
from launch.data.rows import Rows
from launch.data.tokenization import tokenize
from launch.distributed import AgreedError
from launch.evaluate import Arguments
from launch.evaluation import measures
from launch.evaluation.choices import candidate_texts
from launch.evaluation.generation import Progress, longest_answer
from launch.evaluation.generation import generate as generate_answers
from launch.evaluation.grading import extract_number, said_answers
from launch.evaluation.measures import choice_accuracy, exact_match, mean_loss
from launch.evaluation.tasks import choose_task, largest_token_read

ARC = {
    "instruction": "Choose: what is wet?\n\nAnswer1: fire Answer2: water\n\nAnswer format: answer1/answer2",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def final_answer(text: str) -> str:
    """The number that a text ends in, else its first sentence."""
    number = extract_number(text)
    return min(said_answers(text), key=len) if number is None else str(number)


def test_batched_generation_equals_one_by_one(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.choose(tokenizer)
    rows = generate("test", 6)
    expected = []
    for row in rows:
        ids = torch.tensor([template.prompt_ids(row)])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        expected.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    progress, prompts = Progress("test", 6), [template.prompt_ids(row) for row in rows]
    assert generate_answers(model, template, prompts[:4], 12, progress) == expected[:4]
    assert progress.finished == 4
    assert generate_answers(model, template, prompts[4:], 12, progress) == expected[4:]
    assert progress.finished == 6
    # Each row's own continuation as its answer: all right. With one answer changed: all but one.
    answered = [{**row, "answer": final_answer(text)} for row, text in zip(rows, expected, strict=True)]
    assert len({row["answer"] for row in answered}) > 1
    assert exact_match(model, template, in_memory(answered), batch_size=4, max_new_tokens=12) == 1.0
    answered[2]["answer"] = "another"
    assert exact_match(model, template, in_memory(answered), batch_size=4, max_new_tokens=12) == pytest.approx(5 / 6)


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
        pairs = [template.continuation(row, f"It is {name}") for name in names]
        answers = [answer for _, answer in pairs]
        scores = [log_likelihood(model, prompt, answer) for prompt, answer in pairs]
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


LETTERS = {"instruction": "Which?", "choices": ["A", "B"], "answer": "B"}
METALS = {"instruction": "Which?", "choices": ["iron", "gold"], "answer": "gold"}
ASKED = {"role": "user", "content": "Which?"}


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({**LETTERS, "output": "B"}, ["A", "B"]),
        ({**LETTERS, "output": "The answer is (B)."}, ["The answer is (A", "The answer is (B"]),
        ({**LETTERS, "output": "**B**"}, ["**A", "**B"]),
        ({**LETTERS, "output": "B!"}, ["A", "B"]),
        ({**LETTERS, "output": "b."}, ["A", "B"]),
        ({**LETTERS, "output": "Answer: B\n"}, ["Answer: A", "Answer: B"]),
        ({**LETTERS, "output": "B because iron"}, ["A", "B"]),
        ({**LETTERS, "output": "It is a metal: B"}, ["It is a metal: A", "It is a metal: B"]),
        ({**LETTERS, "output": "It is no option."}, ["A", "B"]),
        ({**LETTERS, "output": None}, ["A", "B"]),
        (
            {**LETTERS, "output": "Iron rusts. The answer is B, not A."},
            [f"Iron rusts. The answer is {x}" for x in "AB"],
        ),
        ({**LETTERS, "output": "B is iron. The answer is B."}, ["The answer is A", "The answer is B"]),
        ({**LETTERS, "output": "A is air, so it is B."}, ["A", "B"]),
        ({**METALS, "output": "It is gold."}, ["It is iron", "It is gold"]),
        ({**METALS, "output": "The answer is (B) gold."}, ["The answer is (A) iron", "The answer is (B) gold"]),
        ({**METALS, "output": "The answer is (X) gold."}, ["The answer is iron", "The answer is gold"]),
        ({**METALS, "output": "b. gold", "answer": "(B) gold."}, ["a. iron", "b. gold"]),
        (
            {**LETTERS, "messages": [ASKED, {"role": "assistant", "content": "The answer is (B)."}]},
            ["The answer is (A", "The answer is (B"],
        ),
        (ARC, ["the correct answer is answer1", "the correct answer is answer2"]),
    ],
)
def test_options_are_measured_in_the_words_of_the_rows_own_answer(row: dict[str, Any], texts: list[str]) -> None:
    assert candidate_texts(row) == (texts, 1)


@pytest.mark.parametrize("kind", ["chat", "plain"])
@pytest.mark.parametrize("output", ["The answer is B because", "**B because", "B because", "Answer: B\n"])
def test_the_right_option_is_read_as_in_training(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    output: str,
) -> None:
    template = Template.choose(tokenizer, kind)
    messages = [{"role": "system", "content": "Choose."}, ASKED, {"role": "assistant", "content": output}]
    row = {"messages": messages, "choices": ["A", "B"], "answer": "B"}
    read: list[Any] = []

    def losses(model: Any, template: Template, examples: list[Any]) -> tuple[list[float], list[int]]:
        read.extend(examples)
        return [0.0] * len(examples), [1] * len(examples)

    monkeypatch.setattr(measures, "_token_losses", losses)
    choice_accuracy(model, template, in_memory([row]))
    ids, labels = template.encode(row)
    assert len(read) == 2
    assert read[1]["input_ids"] == ids[: len(read[1]["input_ids"])]
    assert read[1]["labels"] == labels[: len(read[1]["labels"])]
    assert tokenizer.decode(read[1]["input_ids"]).endswith(output[: output.index("B") + 1])


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


def test_loss_is_the_mean_over_the_answer_tokens_of_all_ranks(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[list[float]]
    template, rows = Template.choose(tokenizer), in_memory(generate("test", 7))
    expected, tokens, tolerance = losses_of(model, template, rows)
    examples, parts = list(tokenize(rows, template, 512)), []
    for training in (False, True):
        model.train(training)
        assert mean_loss(model, template, examples, batch_size=3) == pytest.approx(expected, rel=tolerance)
        assert model.training is training
    model.eval()
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: parts.append(list(values)) or values)
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        mean_loss(model, template, examples)
    assert all(count > 0 for _, count in parts)
    losses, counts = (sum(column) for column in zip(*parts, strict=True))
    assert counts == tokens
    assert losses / counts == pytest.approx(expected, rel=tolerance)


def test_ranks_of_a_whole_model_do_not_wait_for_each_other(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that has no rows is done at once: one that waited for it in the batches would wait for ever."""
    monkeypatch.setattr(distributed, "max_over_ranks", lambda _: pytest.fail("a collective that not all ranks enter"))
    assert list(measures._batches(model, [1, 2, 3], 2)) == [([1, 2], True), ([3], True)]
    assert list(measures._batches(model, [], 2)) == []


def test_ranks_of_a_partitioned_model_run_as_many_batches(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "is_partitioned", lambda _: True)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda mine: max(mine, 3.0) if mine else 0.0)
    expected = [([1, 2], True), ([3], True), ([1, 2], False)]
    assert list(measures._batches(model, [1, 2, 3], 2)) == expected
    monkeypatch.setattr(distributed, "max_over_ranks", lambda mine: max(mine, 1.0))
    with pytest.raises(ValueError, match="fewer rows than ranks"):
        list(measures._batches(model, [], 2))


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
    rows = in_memory([ARC, generate("test", 1)[0]])
    with pytest.raises(ValueError, match="memory: row 1 has no options"):
        choose_task("choice", rows)


def test_prompts_count_among_the_tokens_that_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    template, rows = Template.choose(tokenizer), in_memory(generate("test", 3))
    expected = max(token for row in rows.rows for token in template.prompt_ids(row))
    assert largest_token_read(template, rows, "exact") == largest_token_read(template, rows, "choice") == expected
    assert largest_token_read(template, rows, "loss") == 0


def test_the_limit_for_generated_tokens_leaves_room_for_all_that_is_trained(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    reasoning = copy.deepcopy(tokenizer)
    reasoning.chat_template = str(tokenizer.chat_template).replace(
        "message['content']", "message.get('reasoning_content', '') + message['content']"
    )
    template = Template.choose(reasoning)
    short = {"role": "assistant", "content": "The answer is 3."}
    long = {**short, "reasoning_content": "Two and one are three. " * 10}
    asked = {"role": "user", "content": "2 + 1?"}
    for answer in (short, long):
        row = {"messages": [asked, {"role": "assistant", "content": "What? " * 99}, asked, answer]}
        trained = [label != IGNORED_LABEL for label in template.encode(row)[1]]
        count = trained[::-1].index(False)
        written = tokenizer(answer.get("reasoning_content", "") + "The answer is 3.<|end|>")["input_ids"]
        assert count == len(written)
        assert longest_answer(template, in_memory([row])) == math.ceil(1.25 * count)
    assert longest_answer(template, in_memory([{"instruction": "q", "output": None, "answer": "3"}])) == 256


BAD = {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "The answer is 3."}]}


def refusing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with a template that knows no tools."""
    refuses = copy.deepcopy(tokenizer)
    refuses.chat_template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
        + str(tokenizer.chat_template)
    )
    return refuses


def test_a_row_that_the_template_refuses_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    template = Template.choose(refusing(tokenizer))
    good = {"messages": [{"role": "user", "content": "q"}, BAD["messages"][1]]}
    for measured in (longest_answer, lambda template, rows: largest_token_read(template, rows, "exact")):
        with pytest.raises(
            ValueError, match=r"^memory: row 1: the chat template refuses the conversation: no tools here"
        ):
            measured(template, in_memory([good, BAD]))


def run_on(rows: list[dict[str, Any]], model_folder: Path, tmp_path: Path, **arguments: Any) -> dict[str, Any]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return evaluate.run(Arguments(model=str(model_folder), data=str(file), **arguments))


def test_what_can_fail_before_the_measurement_fails_on_every_rank(
    model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an error that all ranks know of: another would leave the other ranks waiting, without the place."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    refusing(tokenizer).save_pretrained(folder)
    with pytest.raises(AgreedError, match=r"rows.jsonl: row 0 \(line 1\): the chat template refuses .*no tools here"):
        run_on([BAD], folder, tmp_path, task="exact")
    with pytest.raises(AgreedError, match=r"rows.jsonl: row 1 \(line 2\) has no options"):
        run_on([ARC, {"instruction": "a", "output": "3"}], model_folder, tmp_path, task="choice")


def test_rows_that_are_not_measured_are_not_counted(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"instruction": "q", "output": output} for output in ("a", "b", "c", "words " * 100)]
    arguments = {"task": "loss", "dtype": "fp32"}
    assert run_on(rows, model_folder, tmp_path, max_length=64, **arguments)["rows"] == 3
    assert run_on(rows, model_folder, tmp_path, **arguments)["rows"] == 4
