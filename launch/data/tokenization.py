"""Turn rows into tokens and labels, and tokens into batches.

Only the answer is trained on: the labels of the prompt's tokens are -100.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import pyarrow.compute as pc
import tokenizers
import torch
import transformers
from datasets.fingerprint import Hasher

from launch.data import chat_template, messages, token_offsets, truncation
from launch.data.chat_template import IGNORED_LABEL, Template
from launch.data.messages import Row
from launch.data.rows import Rows

logger = logging.getLogger(__name__)

_PARALLEL_FROM_ROWS = 20_000
_COLUMNS = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int64")),
        "length": datasets.Value("int64"),
        "needed": datasets.Value("int64"),
        "lost": datasets.List(datasets.Value("string")),
        "rewritten": datasets.Value("int64"),
        "problem": datasets.Value("string"),
    }
)


def tokenize(
    rows: Rows, template: Template, max_length: int, on_long_answer: str = "error", on_long_row: str = "cut"
) -> datasets.Dataset:
    """Rows as `input_ids` and `labels` of at most `max_length` tokens, cached on disk by `datasets`.

    Args:
        on_long_row: "cut" a longer row (see `launch.data.truncation`), "drop" it, or "error". How many lost what is
            logged.
        on_long_answer: "error" or "drop", for rows to cut whose answer does not fit next to the system prompt: it
            would be learnt without its end.

    Raises:
        ValueError: a row that the template refuses, rows that are too long (their number and the first), or nothing
            left.
    """
    if on_long_answer not in ("error", "drop"):
        raise ValueError(f"unknown on_long_answer {on_long_answer!r}: choose error or drop")
    if on_long_row not in ("cut", "drop", "error"):
        raise ValueError(f"unknown on_long_row {on_long_row!r}: choose cut, drop or error")
    encoded = rows.rows.map(
        _encoder(template, max_length),
        remove_columns=rows.rows.column_names,
        features=_COLUMNS,
        num_proc=2 if len(rows) >= _PARALLEL_FROM_ROWS else None,
        desc=f"Tokenizing {rows.source}",
        new_fingerprint=_fingerprint(rows, template, max_length),
    )
    _refuse_problems(rows, encoded)
    kept = _leave_out(rows, encoded, max_length, on_long_answer, on_long_row)
    _say_what_is_lost(rows, kept, max_length)
    return kept.select_columns(["input_ids", "labels"])


def _encoder(template: Template, max_length: int) -> Callable[[Row], dict[str, Any]]:
    def encode(row: Row) -> dict[str, Any]:
        # A problem is a column and not an exception: the message can then count the rows, whatever process met them.
        fitted, problem = truncation.Fitted([], [], 0, 0), None
        try:
            fitted = truncation.fit(template, row, max_length)
        except ValueError as error:
            problem = f"{error}"
        return {
            "input_ids": fitted.ids,
            "labels": fitted.labels,
            "length": fitted.length,
            "needed": fitted.needed,
            "lost": list(fitted.lost),
            "rewritten": fitted.rewritten,
            "problem": problem,
        }

    return encode


def _fingerprint(rows: Rows, template: Template, max_length: int) -> str:
    """A hash of all that the tokens depend on, this program's own code included: the key of the cache."""
    tokenizer = template.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str()
    code = [inspect.getsource(module) for module in (chat_template, messages, token_offsets, truncation)]
    versions = [transformers.__version__, tokenizers.__version__]
    settings = [str(type(template)), str(template.chat), str(max_length), str(type(tokenizer))]
    special = [str(sorted(tokenizer.special_tokens_map.items())), str(tokenizer.chat_template)]
    return str(Hasher.hash([rows.rows._fingerprint, vocabulary, *code, *versions, *settings, *special]))


def _refuse_problems(rows: Rows, encoded: datasets.Dataset) -> None:
    problems = [(index, problem) for index, problem in enumerate(encoded["problem"][:]) if problem is not None]
    if problems:
        index, problem = problems[0]
        others = f" ({len(problems)} of {len(rows)} rows cannot be used)" if len(problems) > 1 else ""
        raise ValueError(f"{rows.where(index)}: {problem}{others}")


def _leave_out(
    rows: Rows, encoded: datasets.Dataset, max_length: int, on_long_answer: str, on_long_row: str
) -> datasets.Dataset:
    """The rows that are to be trained on.

    Raises:
        ValueError: rows that are too long, where that is an error; or none is left.
    """
    cut = on_long_row == "cut"
    sizes = encoded["needed" if cut else "length"][:]
    too_long = [index for index, size in enumerate(sizes) if size > max_length]
    what = "answers" if cut else "rows"
    if too_long and (on_long_answer if cut else on_long_row) == "error":
        counted = ", counted with the system prompt," if cut else ""
        option = "--on_long_answer drop" if cut else "--on_long_row cut or drop"
        first = rows.where(too_long[0]).removeprefix(f"{rows.source}: ")
        raise ValueError(
            f"{rows.source}: {len(too_long)} of {len(rows)} {what} are longer than --max_length {max_length}{counted} "
            f"(first: {first}, {sizes[too_long[0]]} tokens); raise --max_length or use {option}"
        )
    if len(too_long) == len(encoded):
        raise ValueError(f"{rows.source}: no row is left after leaving out {what} longer than {max_length} tokens")
    if too_long:
        logger.warning("%s: %d of %d rows left out, %s too long", rows.source, len(too_long), len(rows), what[:-1])
        dropped = set(too_long)
        encoded = encoded.select([index for index in range(len(encoded)) if index not in dropped])
    return encoded


def _say_what_is_lost(rows: Rows, encoded: datasets.Dataset, max_length: int) -> None:
    lost = [losses for losses in encoded["lost"][:] if losses]
    if lost:
        counts = [(sum(kind in losses for losses in lost), kind) for kind in truncation.LOSSES]
        details = ", ".join(f"{count} lost {kind}" for count, kind in counts if count)
        logger.warning(
            "%s: %d of %d rows cut to %d tokens: %s", rows.source, len(lost), len(rows), max_length, details
        )
    rewritten = sum(count > 0 for count in encoded["rewritten"][:])
    if rewritten:
        logger.warning(
            "%s: in %d of %d rows earlier answers are not trained: the chat template rewrites them once others follow",
            rows.source,
            rewritten,
            len(rows),
        )


def largest_token(rows: datasets.Dataset) -> int:
    """The largest of a data set's `input_ids`."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    return max(pc.max(pc.list_flatten(batch["input_ids"])).as_py() for batch in batches)


@dataclass(frozen=True)
class Collator:
    """Pad a list of rows to the longest one, rounded up to a multiple of 8, on the right.

    Returns int64 tensors `input_ids`, `attention_mask` and `labels`, each of shape (rows, length).
    """

    pad_token_id: int
    multiple: int = 8

    def __call__(self, rows: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, torch.Tensor]:
        rows = list(rows)
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple) * self.multiple

        def padded(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([[*row[key], *[fill] * (length - len(row[key]))] for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "attention_mask": torch.tensor(mask),
            "labels": padded("labels", IGNORED_LABEL),
        }
