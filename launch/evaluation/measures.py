"""Measure a model on rows: exact match, multiple choice and loss. All ranks share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from launch import distributed
from launch.data.chat_template import IGNORED_LABEL, Template
from launch.data.rows import Rows
from launch.data.tokenization import Collator
from launch.evaluation.choices import candidate_texts
from launch.evaluation.generation import Progress, generate, longest_answer
from launch.evaluation.grading import is_correct, reference_answer
from launch.evaluation.tasks import check_task
from launch.model import is_partitioned

T = TypeVar("T")


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    template: Template,
    rows: Rows,
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> float:
    """The share of rows whose greedy continuation gives the reference answer, over all ranks; in [0, 1].

    Args:
        max_new_tokens: longest continuation; None: see :func:`longest_answer`.

    Raises:
        ValueError: a row without an answer to compare with.
    """
    check_task("exact", rows)
    references = [reference_answer(row) for row in rows.rows]
    prompts = [template.prompt_ids(row) for row in rows.rows]
    mine = _my_share(range(len(rows)), lambda index: len(prompts[index]))
    limit = longest_answer(template, rows) if max_new_tokens is None else max_new_tokens
    correct = 0
    with _evaluating(model), Progress("exact match", len(mine)) as progress:
        for batch, counts in _batches(model, mine, batch_size):
            texts = generate(model, template, [prompts[index] for index in batch], limit, progress)
            if counts:
                correct += sum(is_correct(text, str(references[i])) for i, text in zip(batch, texts, strict=True))
    return distributed.sum_over_ranks([correct])[0] / len(rows)


@torch.no_grad()
def choice_accuracy(
    model: PreTrainedModel, template: Template, rows: Rows, *, batch_size: int = 16, length_normalized: bool = False
) -> float:
    """The share of rows whose right option has the highest log-likelihood, over all ranks; in [0, 1].

    Args:
        length_normalized: divide each option's log-likelihood by its number of tokens.

    Raises:
        ValueError: a row without options, or whose answer is not among them.
    """
    check_task("choice", rows)
    candidates = [candidate_texts(row) for row in rows.rows]
    mine = _my_share(range(len(rows)), lambda index: len(str(rows.rows[index])))
    pairs = [(index, option) for index in mine for option in range(len(candidates[index][0]))]
    scores: dict[tuple[int, int], float] = {}
    with _evaluating(model), Progress("multiple choice", len(pairs), "option") as progress:
        for batch, _ in _batches(model, pairs, batch_size):
            texts = [template.continuation(rows.rows[i], candidates[i][0][option]) for i, option in batch]
            examples = [{"input_ids": p + a, "labels": [IGNORED_LABEL] * len(p) + a} for p, a in texts]
            losses, tokens = _token_losses(model, template, examples)
            for pair, loss, count in zip(batch, losses, tokens, strict=True):
                scores[pair] = -loss / count if length_normalized else -loss
            progress.reach(progress.finished + len(batch))
    correct = 0
    for index in mine:
        names, right = candidates[index]
        correct += max(range(len(names)), key=lambda option, i=index: scores[i, option]) == right
    return distributed.sum_over_ranks([correct])[0] / len(rows)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, template: Template, examples: Sequence[Any], *, batch_size: int = 8) -> float:
    """Mean cross-entropy per answer token, over all ranks, in nats.

    Args:
        examples: rows of `input_ids` and `labels` (see `launch.data.tokenization.tokenize`).
    """
    mine = _my_share(list(examples), lambda example: len(example["input_ids"]))
    total, count = 0.0, 0
    with _evaluating(model), Progress("loss", len(mine)) as progress:
        for batch, counts in _batches(model, mine, batch_size):
            losses, tokens = _token_losses(model, template, batch)
            progress.reach(progress.finished + len(batch))
            if counts:
                total, count = total + sum(losses), count + sum(tokens)
    total, tokens_of_all = distributed.sum_over_ranks([total, count])
    return total / max(tokens_of_all, 1.0)


def _token_losses(model: PreTrainedModel, template: Template, examples: list[Any]) -> tuple[list[float], list[int]]:
    """The summed cross-entropy of each example's answer tokens (float32), and how many they are."""
    batch = Collator(template.tokenizer.pad_token_id)(examples)
    labels = batch.pop("labels")[:, 1:].to(model.device)
    logits = model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False).logits[:, :-1]
    answers = labels != IGNORED_LABEL
    # Only the answers' logits become float32: the whole (rows, length, vocabulary) block would dwarf the model.
    losses = torch.nn.functional.cross_entropy(logits[answers].float(), labels[answers], reduction="none")
    row_of = answers.nonzero()[:, 0]
    sums = torch.zeros(len(examples), device=losses.device).index_add_(0, row_of, losses)
    return sums.tolist(), answers.sum(dim=1).tolist()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _my_share(items: Sequence[T], length: Callable[[T], int]) -> list[T]:
    """This rank's part of the items: every world_size-th of them by length, so that batches need little padding."""
    return sorted(items, key=length)[distributed.rank() :: distributed.world_size()]


def _batches(model: PreTrainedModel, items: list[T], size: int) -> Iterator[tuple[list[T], bool]]:
    """The items in batches, and whether a batch counts.

    Of a partitioned model every rank must run as many batches as the one with most: a rank that has no more repeats
    its first, for the others' sake.

    Raises:
        ValueError: a rank has no items at all of a partitioned model's.
    """
    starts = list(range(0, len(items), size))
    rounds = len(starts)
    if is_partitioned(model):
        rounds = int(distributed.max_over_ranks(rounds))
        if distributed.max_over_ranks(float(rounds > 0 and not items)):
            ranks = distributed.world_size()
            raise ValueError(f"fewer rows than ranks ({ranks}): evaluation with ZeRO-3 needs one per rank")
    for turn in range(rounds):
        start = starts[turn] if turn < len(starts) else 0
        yield items[start : start + size], turn < len(starts)
