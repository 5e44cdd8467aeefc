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
    """A text's tokens, without any that the tokenizer would add, and where each of them is in the text."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    """First and last character + 1 of each token."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> TokenizedText:
        """Tokenize `text` once, as a whole."""
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        # Some tokenizers do not count the space that a token begins with: no character is left out here.
        ends = itertools.accumulate((end for _, end in offsets), max, initial=0)
        whole = [(min(start, reached), end) for (start, end), reached in zip(offsets, ends, strict=False)]
        return cls(list(encoded["input_ids"]), whole)

    def first_reaching(self, position: int) -> int:
        """Index of the first token with a character at `position` or behind it."""
        return next((index for index, (_, end) in enumerate(self.offsets) if end > position), len(self.ids))

    def first_behind(self, position: int) -> int:
        """Index of the first token whose characters are all at `position` or behind it."""
        return next((index for index, (start, _) in enumerate(self.offsets) if start >= position), len(self.ids))
