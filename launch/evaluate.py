"""Measure a causal language model on a task: exact match, multiple choice or loss. All ranks share the work.

    python launch/evaluate.py --model runs/grass --data builtin:arithmetic --task exact
    deepspeed launch/evaluate.py --model runs/grass --data path/to/folder --task choice

- exact: generate greedily and compare what follows "The answer is" (or the last number) with the row's `answer`, see launch/grading.py;
- choice: the option whose text the model finds most likely, over the row's `choices` or its "Answer format: a/b/c";
- loss: mean cross-entropy per answer token, in nats.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if __package__ in (None, ""):
    # Run as a script: look for modules in the project, not in launch/, whose evaluate.py would hide a library's.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import launch.interrupt  # noqa: I001  # before what takes seconds to import
import launch.packages  # noqa: F401  # before a name that is not there
import torch
from deepspeed.accelerator import get_accelerator
from transformers import HfArgumentParser, PreTrainedModel

from launch import distributed, dtype
from launch.files import UTF8
from launch.generation import generate, longest_answer
from launch.choices import candidate_texts
from launch.grading import check_task, detect_task, is_correct, reference_answer
from launch.model import (
    DEFAULT_MODEL,
    check_tokens,
    is_partitioned,
    largest_token,
    largest_token_read,
    load,
)
from launch.progress import Progress
from launch.rows import Rows, load_measured, not_read
from launch.template import IGNORED_LABEL, Template
from launch.tokens import Collator, tokenize

TASKS = ("exact", "choice", "loss")

T = TypeVar("T")


def choose_task(wanted: str, rows: Rows) -> str:
    """The task to measure; "auto" is what all rows allow, and rank 0 says why that is no more than the loss.

    Raises:
        ValueError: a row that the wanted task cannot be measured on.
    """
    if wanted != "auto":
        check_task(wanted, rows)
        return wanted
    task, why = detect_task(rows)
    if why and distributed.rank() == 0:
        print(f"measuring the loss only: {why}", flush=True)
    return task


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
    with _evaluation_mode(model), Progress("exact match", len(mine)) as progress:
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
    with _evaluation_mode(model), Progress("multiple choice", len(pairs), "option") as progress:
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
        examples: rows of `input_ids` and `labels` (see `launch.tokens.tokenize`).
    """
    mine = _my_share(list(examples), lambda example: len(example["input_ids"]))
    total, count = 0.0, 0
    with _evaluation_mode(model), Progress("loss", len(mine)) as progress:
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


# ---- sharing the work -----------------------------------------------------------------------------------------------


def _my_share(items: Sequence[T], length: Callable[[T], int]) -> list[T]:
    """This rank's part of the items: every world_size-th of them by length, so that batches need little padding."""
    return sorted(items, key=length)[distributed.rank() :: distributed.world_size()]


def _batches(model: PreTrainedModel, items: list[T], size: int) -> Iterator[tuple[list[T], bool]]:
    """The items in batches, and whether a batch counts.

    Of a partitioned model every rank must run as many batches as the one with most: a rank that has no more repeats its first, for
    the others' sake.

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


class _evaluation_mode:
    """Put the model into evaluation mode for a while."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.was_training)


# ---- command line ---------------------------------------------------------------------------------------------------


@dataclass
class Arguments:
    """What to measure."""

    model: str = field(default=DEFAULT_MODEL, metadata={"help": "Model folder, hub name, or smollm2-135m."})
    data: str = field(
        default="builtin:arithmetic",
        metadata={
            "help": "builtin:arithmetic, a json/jsonl/csv/tsv/parquet file, a folder with a test file, or a hub name."
        },
    )
    encoding: str = field(default=UTF8, metadata={"help": "How a text file is encoded, e.g. latin-1 or utf-16-le."})
    data_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset, e.g. main."})
    split: str = field(
        default="test",
        metadata={
            "help": "Which rows: test (of a file: all), train, or held_out (those that train.py --data holds out)."
        },
    )
    task: str = field(default="auto", metadata={"help": "exact, choice, loss, or auto (what the rows allow)."})
    samples: int | None = field(default=None, metadata={"help": "Only the first so many rows; all if left out."})
    batch_size: int = field(default=16, metadata={"help": "Rows per batch and rank."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Longest generated answer (task exact); a quarter more than the rows' longest if left out."},
    )
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Longest row in tokens (task loss): longer ones are cut, or left out if the answer does not fit."
        },
    )
    length_normalized: bool = field(default=False, metadata={"help": "Task choice: likelihood per token."})
    template: str = field(default="auto", metadata={"help": "chat, plain, or auto (chat if the tokenizer has one)."})
    dtype: str = field(
        default=dtype.AUTO, metadata={"help": "bf16, fp16, fp32, or auto (what the hardware computes)."}
    )


def run(arguments: Arguments) -> dict[str, Any]:
    """Load, measure and return {"task", "value", "rows", "model", "data", "precision"}; "rows" counts those that were measured."""
    if arguments.task not in (*TASKS, "auto"):
        raise ValueError(f"unknown task {arguments.task!r}: choose one of {', '.join(TASKS)}, auto")
    precision = dtype.choose(arguments.dtype)
    precision.announce()
    found = distributed.on_every_rank(
        lambda: load_measured(arguments.data, arguments.split, arguments.data_config, encoding=arguments.encoding)
    )
    if distributed.rank() == 0:
        print(f"data: measuring on {found.share(arguments.samples, '--samples')}{not_read(found)}", flush=True)
    rows = found.take(arguments.samples)
    task = distributed.on_every_rank(lambda: choose_task(arguments.task, rows))
    model, tokenizer = distributed.on_every_rank(lambda: load(arguments.model, precision.name))
    template = Template.choose(tokenizer, arguments.template)
    examples = (
        distributed.on_every_rank(lambda: tokenize(rows, template, arguments.max_length, "drop"))
        if task == "loss"
        else None
    )
    largest = distributed.on_every_rank(
        lambda: largest_token_read(template, rows, task) if examples is None else largest_token(examples)
    )
    check_tokens(model, arguments.model, tokenizer, max(largest, tokenizer.pad_token_id))
    model.to(get_accelerator().current_device_name())
    if task == "exact":
        value = exact_match(
            model, template, rows, batch_size=arguments.batch_size, max_new_tokens=arguments.max_new_tokens
        )
    elif task == "choice":
        value = choice_accuracy(
            model, template, rows, batch_size=arguments.batch_size, length_normalized=arguments.length_normalized
        )
    else:
        value = mean_loss(model, template, list(examples or ()), batch_size=arguments.batch_size)
    measured = len(rows) if examples is None else len(examples)
    result = {"task": task, "value": value, "rows": measured, "model": arguments.model, "data": arguments.data}
    return result | {"precision": precision.as_dict()}


def main() -> int:
    """Run the command line; the exit status."""
    parser = HfArgumentParser(Arguments)
    arguments = parser.parse_args_into_dataclasses(args=distributed.own_arguments(sys.argv[1:]))[0]
    try:
        distributed.start()
        result = run(arguments)
        if distributed.rank() == 0:
            print(json.dumps(result))
    except (ValueError, OSError) as error:
        distributed.report_error(error)
        return 1
    except Exception as error:
        if distributed.first_to_fail(otherwise=not distributed.is_communication_error(error)):
            raise
        return 1
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
