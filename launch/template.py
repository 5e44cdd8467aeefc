"""Turn a row into the text the model reads: the tokenizer's chat template, or a plain one for models without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

IGNORED_LABEL = -100

Row = Mapping[str, Any]
Message = Mapping[str, str]


def conversation(row: Row) -> list[Message]:
    """The messages of a row that has `messages` or `instruction` and `output`."""
    if row.get("messages") is not None:
        return list(row["messages"])
    question = row["instruction"] if not row.get("input") else f"{row['instruction']}\n\n{row['input']}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text: the tokenizer's chat template, or a plain one for models that have none."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool

    @classmethod
    def choose(cls, tokenizer: PreTrainedTokenizerBase, kind: str = "auto") -> Template:
        """`kind`: "chat", "plain", or "auto" (chat if the tokenizer has a template)."""
        if kind not in ("auto", "chat", "plain"):
            raise ValueError(f"unknown template {kind!r}: choose auto, chat or plain")
        if kind == "chat" and not tokenizer.chat_template:
            raise ValueError("--template chat: this tokenizer has no chat template; use --template plain")
        return cls(tokenizer, chat=kind != "plain" and bool(tokenizer.chat_template))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The text of `messages`, with the opening of the assistant's turn if asked for."""
        if self.chat:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
            return str(text)
        turns = [
            f"{message['role'].capitalize()}: {message['content']}{self._end(message)}\n\n" for message in messages
        ]
        return "".join(turns) + ("Assistant: " if add_generation_prompt else "")

    def _end(self, message: Message) -> str:
        return str(self.tokenizer.eos_token or "") if message["role"] == "assistant" else ""

    def segments(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The conversation in pieces of text, each with whether it is trained on (the assistant's turns are).

        Raises:
            ValueError: the chat template rewrites earlier turns, so that no turn has a fixed place in the text.
        """
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            whole = self.render(messages[: index + 1], add_generation_prompt=False)
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise ValueError("the chat template rewrites earlier turns of a conversation; use --template plain")
            # What follows the end-of-turn token (a line break) is fixed by the template: nothing to learn there.
            answer = whole[len(prompt) :].rstrip()
            pieces += [(prompt[len(done) :], False), (self._with_end(answer), True)]
            done = prompt + answer
        return pieces

    def _with_end(self, answer: str) -> str:
        eos = str(self.tokenizer.eos_token or "")
        return answer if answer.endswith(eos) else answer + eos

    def encode(self, row: Row) -> tuple[list[int], list[int]]:
        """Token ids and labels of a row; labels are -100 where nothing is to be learnt."""
        if row.get("messages") is None and row.get("instruction") is None:
            pieces = [(self._with_end(str(row["text"])), True)]
        else:
            pieces = self.segments(conversation(row))
        ids: list[int] = []
        labels: list[int] = []
        for text, trained in pieces:
            tokens = self._tokens(text, first=not ids)
            ids += tokens
            labels += tokens if trained else [IGNORED_LABEL] * len(tokens)
        return ids, labels

    def prompt_ids(self, row: Row) -> list[int]:
        """Token ids of a row's prompt: everything before the assistant's last turn, and that turn's opening."""
        return self._tokens(self.render(conversation(row)[:-1], add_generation_prompt=True), first=True)

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of `answer` as the continuation of a prompt."""
        return self._tokens(answer, first=False)

    def _tokens(self, text: str, first: bool) -> list[int]:
        # A chat template writes its own opening token.
        return list(self.tokenizer(text, add_special_tokens=first and not self.chat)["input_ids"])
