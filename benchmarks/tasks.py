# SPDX-License-Identifier: Apache-2.0
"""Tasks of the quality suite: what is trained on, and what is measured."""

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launch.data.chat_template import Template
from launch.data.rows import Rows
from launch.data.sources import load_splits
from launch.data.tokenization import tokenize
from launch.evaluation.grading import reference_answer
from launch.evaluation.measures import choice_accuracy, exact_match, mean_loss

BUILTIN = "builtin:arithmetic"
ROWS = 48  # per measure, see Exam


@dataclass(frozen=True, kw_only=True)
class Task:
    """Sources are folders within ``--data``, or the built-in one.

    Attributes:
        train: sources whose training rows are put together; their test rows measure the loss.
        exact: sources answered by generating; the number is compared.
        choice: sources answered by the likelihood of their options.
        sequence: longest row in tokens; longer prompts lose their start, longer answers are left out.
        micro_batch: rows per micro-batch.
        new_tokens: longest generated answer.
    """

    train: tuple[str, ...]
    exact: tuple[str, ...] = ()
    choice: tuple[str, ...] = ()
    sequence: int = 256
    micro_batch: int = 2
    new_tokens: int = 100

    def answered(self, rows: int) -> int:
        """How many of ``rows`` rows per source measure the accuracy: generating takes long."""
        return rows // 2 if self.exact else rows


CHOICES = ("arc_easy", "arc_challenge", "boolq")
TASKS = {
    "arithmetic": Task(train=("gsm8k",), exact=("multiarith", "addsub", "singleeq")),
    "choice": Task(train=CHOICES, choice=CHOICES, sequence=192, micro_batch=4),
    "epoch": Task(
        train=("gsm8k",), exact=("gsm8k", "multiarith", "addsub", "singleeq"), micro_batch=4, new_tokens=160
    ),
    "builtin": Task(train=(BUILTIN,), exact=(BUILTIN,), sequence=128),
}


class Exam:
    """The rows of a task as tokens, and measurements: development rows choose settings, test rows are reported.

    Args:
        data: folder of the sources; None will do for the built-in task.
        rows: test rows per source for accuracy (half as many where answers are generated), and in all for each loss.

    Raises:
        ValueError: a source is missing, or not readable.
    """

    def __init__(self, task: Task, template: Template, data: Path | None, rows: int) -> None:
        self.task, self.template, self._data, self._rows = task, template, data, rows
        splits = {source: self._splits(source) for source in task.train}
        self._share = -(-rows // len(task.train))
        parts = {source: list(self._tokens(found["train"])) for source, found in splits.items()}
        self.train = [row for found in parts.values() for row in found]
        self.train_rows = {source: len(found) for source, found in parts.items()}
        held_out = [list(self._tokens(found["test"].take(2 * self._share))) for found in splits.values()]
        self.dev = [row for found in held_out for row in found[: self._share]]
        self.test = [row for found in held_out for row in found[self._share :]]

    def batches(self, seed: int) -> Iterator[list[Mapping[str, Any]]]:
        """Training rows, ``micro_batch`` at a time, in an order that is the same for all methods; without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train), generator=generator).tolist()
            for first in range(0, len(order) - self.task.micro_batch + 1, self.task.micro_batch):
                yield [self.train[index] for index in order[first : first + self.task.micro_batch]]

    def loss(self, model: Any, split: str) -> float:
        """Mean cross-entropy per answer token of the ``dev`` or the ``test`` rows, in nats."""
        return mean_loss(model, self.template, getattr(self, split), batch_size=8)

    def accuracy(self, model: Any) -> dict[str, float]:
        """Share of right answers per source."""
        generate = partial(exact_match, model, self.template, batch_size=32, max_new_tokens=self.task.new_tokens)
        choose = partial(choice_accuracy, model, self.template, batch_size=16)
        found = {source: generate(self._unseen(source)) for source in self.task.exact}
        return found | {source: choose(self._unseen(source)) for source in self.task.choice}

    def constant(self) -> dict[str, float]:
        """Share of right answers per multiple-choice source with the most frequent answer of those rows for all."""
        answers = {source: [*map(reference_answer, self._unseen(source).rows)] for source in self.task.choice}
        return {source: Counter(mine).most_common(1)[0][1] / len(mine) for source, mine in answers.items()}

    def _unseen(self, source: str) -> Rows:
        """Test rows of a source behind those that chose the settings."""
        rows, count = self._splits(source)["test"], self.task.answered(self._rows)
        first = self._share if source in self.task.train else 0
        return replace(rows, rows=rows.rows.select(range(first, min(first + count, len(rows)))))

    def fingerprint(self) -> str:
        """Of the training rows: two machines that read the same data have the same."""
        return f"{zlib.crc32(repr([row['input_ids'] for row in self.train]).encode()):08x}"

    def _splits(self, source: str) -> dict[str, Rows]:
        if source.startswith("builtin:"):
            return load_splits(source)
        if self._data is None:
            raise ValueError(f"--data is not given: the task needs a folder with {source}/ in it")
        return load_splits(str(self._data / source))

    def _tokens(self, rows: Rows) -> Any:
        return tokenize(rows, self.template, self.task.sequence, "drop")
