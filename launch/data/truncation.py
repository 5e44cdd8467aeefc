"""Make a row fit into a number of tokens, and say what it loses by that.

What is cut stays a conversation: beginning of text, system prompt, prompt, answer. A conversation first loses its
earlier turns, as few as will do, and is rendered anew without them. If it is too long even from its last question on,
that question loses its start. Plain text loses its end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from launch.data.chat_template import Encoded, Template
from launch.data.messages import SYSTEM_ROLES, Message, Row, conversation, is_text

TURNS, PROMPT, TEXT = "earlier turns", "the start of the prompt", "the end of the text"
LOSSES = (TURNS, PROMPT, TEXT)


@dataclass(frozen=True)
class Fitted:
    """A row's tokens, how many there were before the cut, and what was lost."""

    ids: list[int]
    labels: list[int]
    length: int
    needed: int
    """The fewest tokens that a cut can leave: with more than the limit the row does not fit."""
    lost: tuple[str, ...] = ()
    rewritten: int = 0
    """See `chat_template.Rendered.rewritten`."""


def fit(template: Template, row: Row, max_length: int) -> Fitted:
    """Encode a row in at most `max_length` tokens; where that is impossible, `needed` says so and nothing is cut.

    Raises:
        ValueError: see `Template.encode`.
    """
    if is_text(row):
        encoded = template.encode_text(str(row["text"]))
        length = len(encoded.ids)
        end_lost = (TEXT,) if length > max_length else ()
        return Fitted(encoded.ids[:max_length], encoded.labels[:max_length], length, 0, end_lost)
    template, messages = template.for_row(row), conversation(row)
    encoded = template.encode_messages(messages)
    length = len(encoded.ids)
    if length <= max_length:
        return Fitted(encoded.ids, encoded.labels, length, 0, (), encoded.rewritten)
    shorter = _without_earlier_turns(messages)
    # The more turns are gone, the shorter the rest: the longest that fits is looked for.
    fewest = bisect_left(shorter, True, key=lambda rest: len(template.encode_messages(rest).ids) <= max_length)
    rest = shorter[min(fewest, len(shorter) - 1)] if shorter else messages
    encoded = template.encode_messages(rest, with_cuttable=True)
    happened = {TURNS: bool(shorter), PROMPT: len(encoded.ids) > max_length}
    lost = tuple(loss for loss, has in happened.items() if has)
    ids, labels = _without_start(encoded, max_length)
    return Fitted(ids, labels, length, _needed(encoded), lost, encoded.rewritten)


def _without_earlier_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """The conversation begun at its second message from the user, at its third, and so on.

    Each with the system prompt.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    starts = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user"]
    return [[*messages[:first], *messages[start:]] for start in starts]


def _needed(encoded: Encoded) -> int:
    start, stop = encoded.cuttable
    return len(encoded.ids) - (stop - start)


def _without_start(encoded: Encoded, max_length: int) -> tuple[list[int], list[int]]:
    """Ids and labels without the start of the first message, as much of it as is too long."""
    excess, start = len(encoded.ids) - max_length, encoded.cuttable[0]
    if excess <= 0 or _needed(encoded) > max_length:
        return encoded.ids, encoded.labels
    ids, labels = ([*part[:start], *part[start + excess :]] for part in (encoded.ids, encoded.labels))
    return ids, labels
