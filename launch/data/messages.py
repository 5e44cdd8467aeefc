"""What a row says: the messages of a conversation, their content as text, and the tools they call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Message = Mapping[str, Any]

SYSTEM_ROLES = ("system", "developer")


def text_of(content: Any) -> str:
    """The text of a message's content, which is a string, nothing, or a list of text parts.

    Raises:
        ValueError: a part that is not text, or content of another type; which one is named.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"has content of type {type(content).__name__}, which is neither text nor a list of parts")
    return "".join(_text_of_part(part, index) for index, part in enumerate(content))


def _text_of_part(part: Any, index: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text":
        raise ValueError(f"has a part {index} of type {kind!r}; only parts of type 'text' can be trained on")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"has a part {index} of type 'text' without text")
    return str(part["text"])


def conversation(row: Row) -> list[Message]:
    """The messages of a row, their content as text: `messages` (a list or JSON text), or `instruction` and `output`.

    Other keys of a message stay as they are, but for what is None: a table fills in None where a row has no such key.
    In the arguments of a call None is a value: those that a table has filled in are gone when `launch.data.records`
    has read it.

    Raises:
        ValueError: content that is not text; the message is named.
    """
    if row.get("messages") is None:
        question = row["instruction"] if not row.get("input") else f"{row['instruction']}\n\n{row['input']}"
        return [{"role": "user", "content": question}, {"role": "assistant", "content": row.get("output") or ""}]
    messages: list[Message] = []
    said = row["messages"]
    for index, message in enumerate(json.loads(said) if isinstance(said, str) else said):
        try:
            content = text_of(message.get("content"))
        except ValueError as error:
            raise ValueError(f"message {index} {error}") from error
        messages.append({**_without_none(message), "content": content})
    return messages


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        inside = {key: inner for key, inner in value.items() if inner is not None}
        return {key: inner if key == "arguments" else _without_none(inner) for key, inner in inside.items()}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def is_text(row: Row) -> bool:
    """Whether a row is plain text rather than a conversation."""
    return row.get("messages") is None and row.get("instruction") is None


def called_tools(message: Message) -> list[str]:
    """The names of the tools that a message calls."""
    return [str(function.get("name")) for function in _called(message)]


def call_arguments(message: Message) -> list[Mapping[str, Any]]:
    """The arguments of a message's calls, where they are objects."""
    found = [function.get("arguments") for function in _called(message)]
    return [arguments for arguments in found if isinstance(arguments, Mapping)]


def with_arguments_as_text(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text, as OpenAI writes them."""
    if not call_arguments(message):
        return message
    return {**message, "tool_calls": [_with_arguments_as_text(call) for call in message["tool_calls"]]}


def _with_arguments_as_text(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if call.get("function"):
        return {**call, "function": _with_arguments_as_text(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": json_text(arguments)} if isinstance(arguments, Mapping) else call


def json_text(value: Any) -> str:
    """A value as JSON, its letters as they are."""
    return json.dumps(value, ensure_ascii=False)


def _called(message: Message) -> list[Mapping[str, Any]]:
    calls = message.get("tool_calls")
    return [call.get("function") or call for call in calls or () if isinstance(call, Mapping)]


def offered_tools(row: Row) -> tuple[Mapping[str, Any], ...]:
    """The tools that a row of messages offers in `tools`: a list of JSON schemas, or the same as a string.

    Raises:
        ValueError: anything else.
    """
    tools = row.get("tools") if row.get("messages") is not None else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError as error:
            raise ValueError(f"tools is not valid JSON: {error}") from error
    else:
        # A table fills in None where a schema has no such key; in JSON null is what somebody wrote.
        tools = _without_none(tools)
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools is a {type(tools).__name__}, not a list of JSON schemas")
    return tuple(tools)
