"""Turn rows into tokens and labels, and tokens into batches.

Only the answer is trained on: the labels of the prompt's tokens are -100.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch

from launch.rows import Rows
from launch.template import IGNORED_LABEL, Row, Template

logger = logging.getLogger(__name__)

_PARALLEL_FROM_ROWS = 20_000


def tokenize(rows: Rows, template: Template, max_length: int, on_long_answer: str = "error") -> datasets.Dataset:
    """Rows as `input_ids` and `labels` of at most `max_length` tokens, cached on disk by `datasets`.

    A conversation that is too long loses the start of its prompt, plain text its end; how many did is logged. An
    answer that alone does not fit would be learnt without its end: an error, or left out with `on_long_answer="drop"`.

    Raises:
        ValueError: answers longer than `max_length` (their number and the first row), or nothing left.
    """
    if on_long_answer not in ("error", "drop"):
        raise ValueError(f"unknown on_long_answer {on_long_answer!r}: choose error or drop")
    encoded = rows.rows.map(
        _encoder(template, max_length),
        remove_columns=rows.rows.column_names,
        num_proc=2 if len(rows) >= _PARALLEL_FROM_ROWS else None,
        desc=f"Tokenizing {rows.source}",
    )
    lengths = encoded["length"]
    too_long = [index for index, length in enumerate(encoded["answer_length"]) if length > max_length]
    if too_long and on_long_answer == "error":
        raise ValueError(
            f"{rows.source}: {len(too_long)} of {len(rows)} answers are longer than --max_length {max_length} (first: "
            f"row {too_long[0]}, {encoded[too_long[0]]['answer_length']} tokens); raise --max_length or leave these "
            "rows out with --on_long_answer drop"
        )
    cut = sum(length > max_length for length in lengths) - len(too_long)
    if cut:
        logger.warning("%s: %d of %d rows cut to %d tokens", rows.source, cut, len(rows), max_length)
    if too_long:
        logger.warning("%s: %d of %d rows left out, answer too long", rows.source, len(too_long), len(rows))
        dropped = set(too_long)
        encoded = encoded.select([index for index in range(len(encoded)) if index not in dropped])
    if len(encoded) == 0:
        raise ValueError(f"{rows.source}: no row is left after leaving out answers longer than {max_length} tokens")
    return encoded.remove_columns(["length", "answer_length"])


def _encoder(template: Template, max_length: int) -> Callable[[Row], dict[str, Any]]:
    def encode(row: Row) -> dict[str, Any]:
        ids, labels = template.encode(row)
        is_text = row.get("messages") is None and row.get("instruction") is None
        last_prompt_token = max((i for i, label in enumerate(labels) if label == IGNORED_LABEL), default=-1)
        kept = slice(0, max_length) if is_text else slice(max(0, len(ids) - max_length), len(ids))
        return {
            "input_ids": ids[kept],
            "labels": labels[kept],
            "length": len(ids),
            "answer_length": 0 if is_text else len(ids) - last_prompt_token - 1,
        }

    return encode


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
