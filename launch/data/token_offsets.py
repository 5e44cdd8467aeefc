"""Which tokens of a text belong to an answer: the position of each token in the text."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# Tokenizers add the same tokens around any text.
_ANY_TEXT = "a"


def opening_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before a text: its beginning-of-text token, or nothing."""
    bare = list(tokenizer(_ANY_TEXT, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(_ANY_TEXT)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


@dataclass(frozen=True)
class TokenizedText:
    """A text, its tokens without any that the tokenizer would add, and where each token is in the text."""

    tokenizer: PreTrainedTokenizerBase
    text: str
    ids: list[int]
    offsets: list[tuple[int, int]] | None
    """First and last character + 1 of each token; None where the tokenizer does not tell."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> TokenizedText:
        """Tokenize `text` once, as a whole."""
        if not tokenizer.is_fast:
            return cls(tokenizer, text, list(tokenizer(text, add_special_tokens=False)["input_ids"]), None)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return cls(tokenizer, text, list(encoded["input_ids"]), _without_gaps(encoded["offset_mapping"]))

    def first_reaching(self, position: int) -> int:
        """Index of the first token with a character at `position` or behind it."""
        if self.offsets is None:
            return self._tokens_before(position)
        return next((index for index, (_, end) in enumerate(self.offsets) if end > position), len(self.ids))

    def first_behind(self, position: int) -> int:
        """Index of the first token whose characters are all at `position` or behind it."""
        if self.offsets is None:
            return self._tokens_before(position)
        return next((index for index, (start, _) in enumerate(self.offsets) if start >= position), len(self.ids))

    def _tokens_before(self, position: int) -> int:
        """How many tokens the text before `position` has, if they are those that the whole text begins with."""
        before = list(self.tokenizer(self.text[:position], add_special_tokens=False)["input_ids"])
        if self.ids[: len(before)] != before:
            raise ValueError(
                f"the tokenizer ({type(self.tokenizer).__name__}) does not tell where its tokens stand in the text, "
                f"and one of them reaches across the border after {self.text[max(0, position - 20) : position]!r}; use "
                "the fast tokenizer of this model (a folder with tokenizer.json)"
            )
        return len(before)


def _without_gaps(offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets that leave out no character: some tokenizers do not count the space that a token begins with."""
    ends = itertools.accumulate((end for _, end in offsets), max, initial=0)
    return [(min(start, reached), end) for (start, end), reached in zip(offsets, ends, strict=False)]
