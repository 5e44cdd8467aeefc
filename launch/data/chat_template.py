"""Turn a row into the text the model reads, and into tokens: the tokenizer's chat template, or a plain one.

A conversation is rendered and tokenized once, as a whole. The assistant's turns are trained: from the end of the
template's generation prompt up to and including the end of turn that the template writes. Three rules decide at a
border:

- Spaces at the end of a generation prompt belong to the answer: most tokenizers join them to the answer's first word.
- A token is trained if it has a character of an answer in it, also if it begins or ends outside.
- The tokenizer's end-of-text token follows the last turn, once, unless the template has just written it.

A chat template writes its own beginning of text. Plain conversations and plain text begin with the tokenizer's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from launch.data.messages import (
    SYSTEM_ROLES,
    Message,
    Row,
    call_arguments,
    called_tools,
    conversation,
    is_text,
    json_text,
    offered_tools,
    with_arguments_as_text,
)
from launch.data.token_offsets import TokenizedText, opening_tokens

IGNORED_LABEL = -100

# A character of no language: marks a position in what a template writes.
_MARK = "\ue000"


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation up to its last end of turn, and where in it the trained turns are."""

    text: str
    answers: tuple[tuple[int, int], ...]
    """First character and last character + 1 of each trained turn, end of turn included."""
    rewritten: int
    """Assistant turns that are not trained, since the template writes them differently once others follow."""


@dataclass(frozen=True)
class Encoded:
    """The tokens of a row."""

    ids: list[int]
    labels: list[int]
    """The token itself where it is trained, -100 elsewhere."""
    rewritten: int = 0
    """See `Rendered.rewritten`."""
    cuttable: tuple[int, int] = (0, 0)
    """First token and last token + 1 of the first message behind the system prompt: what a cut may take."""


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text: the tokenizer's chat template, or a plain one for models that have none."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    tools: tuple[Mapping[str, Any], ...] = ()
    """The tools that a conversation offers to the assistant, see `for_row`."""

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, kind: str = "auto") -> Template:
        """`kind`: "chat", "plain", or "auto" (chat if the tokenizer has a template)."""
        if kind not in ("auto", "chat", "plain"):
            raise ValueError(f"unknown template {kind!r}: choose auto, chat or plain")
        if not tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) does not tell where its tokens are in the text, so what is "
                "trained cannot be marked; use the fast tokenizer of this model (a folder with tokenizer.json)"
            )
        if kind == "chat" and not tokenizer.chat_template:
            raise ValueError("--template chat: this tokenizer has no chat template; use --template plain")
        return cls(tokenizer, chat=kind != "plain" and bool(tokenizer.chat_template))

    def for_row(self, row: Row) -> Template:
        """The template with the tools that a row offers.

        Raises:
            ValueError: what a row offers is not a list of tools.
        """
        tools = offered_tools(row)
        return replace(self, tools=tools) if tools else self

    # ---- text -------------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of `messages`, with the opening of the assistant's turn if asked for.

        Raises:
            ValueError: the template refuses the conversation; in its own words.
        """
        if not self.chat:
            turns = [
                f"{message['role'].capitalize()}: {message['content']}{self._plain_end(message)}\n\n"
                for message in messages
            ]
            return "".join(turns) + ("Assistant: " if add_generation_prompt else "")
        try:
            return self._written(messages, add_generation_prompt)
        except Exception as error:  # a template is a program: what it raises is its own affair
            words = " ".join(f"{error}".split()) or type(error).__name__
            raise ValueError(
                f"the chat template refuses the conversation: {words}; change these rows, or use --template plain"
            ) from error

    def _written(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """What the chat template writes.

        Most templates want the arguments of a call as an object. Some join them to their text as they are: an object
        ends such a template, or stands there as Python writes it. These get JSON text.
        """
        arguments = written = [found for message in messages for found in call_arguments(message)]
        text = other = ""
        try:
            text = self._applied(messages, add_generation_prompt)
            written = [found for found in arguments if found and str(found) in text]
            if not written:
                return text
        except Exception:
            if not arguments:
                raise
        with contextlib.suppress(Exception):
            other = self._applied([with_arguments_as_text(message) for message in messages], add_generation_prompt)
        # Words of a message may look like an object of Python. Then the template puts the JSON text into quotes.
        if all(json_text(found) in other for found in written):
            return other
        return text or self._applied(messages, add_generation_prompt)  # which says again what it refuses

    def _applied(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in self.tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def _plain_end(self, message: Message) -> str:
        return str(self.tokenizer.eos_token or "") if message["role"] == "assistant" else ""

    def layout(self, messages: Sequence[Message]) -> Rendered:
        """The whole conversation as text, and which parts of it are trained.

        A turn that the template writes differently once others follow (a reasoning block that only the last turn
        keeps) is not trained: the model would learn what it is never asked for.

        Raises:
            ValueError: a refused conversation, or a last turn that does not begin where the generation prompt ends.
        """
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError("the conversation does not end with a message from the assistant")
        whole = self.render(messages, add_generation_prompt=False)
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [self._span(messages, index, whole) for index in turns]
        self._check_tools(messages, whole, dict(zip(turns, answers, strict=True)))
        if answers[-1] is None:
            raise ValueError(
                "the chat template rewrites its generation prompt when the answer is there, so that the answer has no "
                "fixed place; use --template plain, or a tokenizer with another template"
            )
        kept = tuple(span for span in answers if span is not None)
        return Rendered(whole[: kept[-1][1]], kept, len(answers) - len(kept))

    def _span(self, messages: Sequence[Message], index: int, whole: str) -> tuple[int, int] | None:
        """Start and end of the assistant's message `index` in the whole text.

        None if it is not there as when it was last.
        """
        start = self._opened(messages[:index], messages[index])
        text = whole if index == len(messages) - 1 else self.render(messages[: index + 1], False)
        end = self._end_of_turn(text)
        return (len(start), end) if whole.startswith(text[:end]) and text[:end].startswith(start) else None

    def _opened(self, before: Sequence[Message], answer: Message) -> str:
        """The text before an answer."""
        if before:
            return self.render(before, add_generation_prompt=True).rstrip(" ")
        # Nothing precedes the answer, and of no messages at all there is no generation prompt.
        return self.render([{**answer, "content": _MARK}], False).partition(_MARK)[0].rstrip(" ")

    def _end_of_turn(self, text: str) -> int:
        """Where the last turn of a text ends.

        The line breaks that a template writes behind it are nothing to learn.
        """
        tail = self._tail
        return len(text) - len(tail) + len(tail.rstrip()) if text.endswith(tail) else len(text.rstrip())

    @cached_property
    def _tail(self) -> str:
        """What the template writes behind an answer; the mark, with which no text ends, if it refuses the question."""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            return self.render(turns, add_generation_prompt=False).rpartition(_MARK)[2]
        except ValueError:
            return _MARK

    def _check_tools(
        self, messages: Sequence[Message], whole: str, spans: Mapping[int, tuple[int, int] | None]
    ) -> None:
        """Refuse tools that the template leaves out: the model would learn to answer without the call, or unasked.

        Args:
            spans: of the assistant's messages in the whole text. The call must be in there: where tools are offered,
                its tool is named elsewhere, too.
        """
        named = [("the row offers", str((tool.get("function") or tool).get("name")), whole) for tool in self.tools]
        for index, message in enumerate(messages):
            start, end = spans.get(index) or (0, len(whole))
            named += [(f"message {index} calls", name, whole[start:end]) for name in called_tools(message)]
        for what, name, text in named:
            if not self.chat or name not in text:
                raise ValueError(
                    f"{what} the tool {name!r}, which the {'chat' if self.chat else 'plain'} template leaves out; "
                    "leave such rows out, or use a tokenizer whose chat template writes tools"
                )

    # ---- tokens -----------------------------------------------------------------------------------------------------

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Token ids and labels of a row; labels are -100 where nothing is to be learnt.

        Raises:
            ValueError: see `layout` and `conversation`.
        """
        if is_text(row):
            encoded = self.encode_text(str(row["text"]))
        else:
            encoded = self.for_row(row).encode_messages(conversation(row))
        return encoded.ids, encoded.labels

    def encode_text(self, text: str) -> Encoded:
        """Plain text between the tokenizer's beginning and end of text; all but the beginning is trained."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        # A text may bring the tokens itself.
        first = [] if ids[: len(self._opening)] == self._opening else self._opening
        end = self._end(ids)
        return Encoded(first + ids + end, [IGNORED_LABEL] * len(first) + ids + end)

    def encode_messages(self, messages: Sequence[Message], with_cuttable: bool = False) -> Encoded:
        """A conversation, tokenized once.

        Args:
            with_cuttable: also find what a cut may take.

        Raises:
            ValueError: see `layout`.
        """
        rendered = self.layout(messages)
        found = TokenizedText.of(self.tokenizer, rendered.text)
        # A chat template writes its own beginning of text.
        first = [] if self.chat else self._opening
        end = self._end(found.ids)
        labels = [IGNORED_LABEL] * len(found.ids)
        for answer, end_of_turn in rendered.answers:
            trained = slice(found.first_reaching(answer), found.first_behind(end_of_turn))
            labels[trained] = found.ids[trained]
        cuttable = self._first_message(messages, rendered) if with_cuttable else (0, 0)
        start = len(first) + found.first_behind(cuttable[0])
        return Encoded(
            ids=first + found.ids + end,
            labels=[IGNORED_LABEL] * len(first) + labels + end,
            rewritten=rendered.rewritten,
            cuttable=(start, max(start, len(first) + found.first_reaching(cuttable[1]))),
        )

    def prompt_ids(self, row: Row) -> list[int]:
        """Token ids of a row's prompt: those before the first that is trained of the assistant's last turn."""
        messages = conversation(row)
        return self.continuation(row, messages[-1]["content"])[0]

    def continuation(self, row: Row, answer: str) -> tuple[list[int], list[int]]:
        """Token ids of a row's prompt, and of `answer` instead of its own, without an end of turn; as in training."""
        messages = conversation(row)
        messages[-1] = {"role": "assistant", "content": answer}
        rendered = self.for_row(row).layout(messages)
        found = TokenizedText.of(self.tokenizer, rendered.text)
        start = found.first_reaching(rendered.answers[-1][0])
        end_of_turn = self._tail.rstrip()
        stop = found.first_behind(len(rendered.text.removesuffix(end_of_turn)))
        return ([] if self.chat else self._opening) + found.ids[:start], found.ids[start:stop]

    def _end(self, ids: Sequence[int]) -> list[int]:
        """The end-of-text token, unless the ids end with it or there is none."""
        eos = self.tokenizer.eos_token_id
        return [] if eos is None or (ids and ids[-1] == eos) else [eos]

    @cached_property
    def _opening(self) -> list[int]:
        return opening_tokens(self.tokenizer)

    def _first_message(self, messages: Sequence[Message], rendered: Rendered) -> tuple[int, int]:
        """Start and end in the text of the first message behind the system prompt; an empty span if it is an answer.

        It is found by rendering other content: what stays the same before it and behind it is the template's.
        """
        first = next(index for index, message in enumerate(messages) if message["role"] not in SYSTEM_ROLES)
        if messages[first]["role"] == "assistant":
            return rendered.answers[0][0], rendered.answers[0][0]
        prompt = self.render(messages[:-1], add_generation_prompt=True)
        marked = [{**m, "content": _MARK} if m is messages[first] else m for m in messages[:-1]]
        other = self.render(marked, add_generation_prompt=True)
        return _common(prompt, other), len(prompt) - _common(prompt[::-1], other[::-1])


def _common(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    differing = (index for index, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    return next(differing, min(len(text), len(other)))
