"""Show training rows as the model gets them: which text is given, and which is trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby

import datasets
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from launch.data.chat_template import IGNORED_LABEL

_WIDTH = 110
_ROW_LINES = 40
_PIECE_CHARACTERS = 1200


def count_tokens(rows: datasets.Dataset) -> dict[str, float]:
    """The tokens of tokenized rows (see `tokenization.tokenize`): "all", "trained", and "trained_share" in [0, 1]."""
    tokens = trained = 0
    for batch in rows.with_format("arrow").iter(batch_size=1000):
        labels = pc.list_flatten(batch["labels"])
        tokens += len(labels)
        trained += pc.sum(pc.not_equal(labels, IGNORED_LABEL)).as_py() or 0
    return {"all": tokens, "trained": trained, "trained_share": trained / max(tokens, 1)}


def show(tokenizer: PreTrainedTokenizerBase, rows: datasets.Dataset, number: int) -> str:
    """The first `number` rows as text for a terminal, and what the whole training set has."""
    shown = [
        f"training row {index + 1} of {len(rows)}: {show_row(tokenizer, row['input_ids'], row['labels'])}"
        for index, row in enumerate(rows.select(range(min(number, len(rows)))))
    ]
    count = count_tokens(rows)
    whole = f"all {len(rows)} training rows: {_counted(count['all'], count['trained'])}"
    return _printable_here("\n".join([*shown, whole]))


def show_row(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """One row: how many tokens, then its text line by line, each marked as given or trained.

    Line breaks and control characters of the text are written as escapes. A long row is shortened in the middle.
    """
    lines = []
    for trained, text in _pieces(tokenizer, ids, labels):
        mark = "trained | " if trained else "  given | "
        lines += [mark + line for line in _lines(_shortened(text))]
    trained_tokens = sum(label != IGNORED_LABEL for label in labels)
    return "\n".join([_counted(len(ids), trained_tokens), *_fewer(lines)])


def _counted(tokens: float, trained: float) -> str:
    return f"{tokens} tokens, {trained} of them trained ({trained / max(tokens, 1):.1%})"


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[bool, str]]:
    """The text of each run of tokens that are all trained, or all not."""
    pieces, end, done = [], 0, ""
    for trained, run in groupby(labels, key=lambda label: label != IGNORED_LABEL):
        end += len(list(run))
        # Decoded from the start each time: decoders drop a space at the start of what they are given.
        text = str(tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False))
        pieces.append((trained, text[len(done) :]))
        done = text
    return pieces


def _shortened(text: str) -> str:
    if len(text) <= _PIECE_CHARACTERS:
        return text
    half = _PIECE_CHARACTERS // 2
    return f"{text[:half]}[... {len(text) - 2 * half} characters ...]{text[-half:]}"


def _lines(text: str) -> list[str]:
    """The text in lines of the terminal: broken behind each line break, and where a line gets too long."""
    lines = []
    for line in text.splitlines(keepends=True) or [""]:
        escaped = "".join(_escaped(character) for character in line)
        lines += [escaped[start : start + _WIDTH] for start in range(0, len(escaped), _WIDTH)] or [""]
    return lines


def _escaped(character: str) -> str:
    """A character that a terminal shows as itself, or its escape: others would move the cursor or change colours."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _fewer(lines: list[str]) -> list[str]:
    if len(lines) <= _ROW_LINES:
        return lines
    half = _ROW_LINES // 2
    return [*lines[:half], f"        | [... {len(lines) - 2 * half} lines ...]", *lines[-half:]]


def _printable_here(text: str) -> str:
    """The text with escapes for what the terminal's encoding lacks."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
