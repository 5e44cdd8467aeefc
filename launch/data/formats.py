"""Turn a record of a data file into a row to train on, or say what is wrong with it.

| record | row |
|---|---|
| `messages`, each with role and content, or from and value; also as JSON text | `messages`, behind `system` if given |
| `conversations` (ShareGPT) | the same |
| `instruction` (`input`), `output` | the same, with `messages` beside them if there is a `system` |
| `prompt` and `completion`, texts | `instruction` and `output` |
| `prompt` and `completion`, lists of messages | `messages` |
| `text` | the same |

`answer`, `choices`, and the `tools` that a conversation offers are kept. A number, true or false in the place of a
text becomes its text; a list or an object there is refused, since nobody but the user knows how the model should read
it. Text parts of a message are joined. The arguments of a tool call become an object, also where they are JSON text,
as OpenAI writes them: a chat template would put that text into quotes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import datasets

from launch.data.messages import conversation, text_of
from launch.data.records import name_of_type
from launch.data.values import as_text, parsed, plain

TEXTS = ("instruction", "input", "output", "answer", "text")
FEATURES = datasets.Features(
    {
        **dict.fromkeys(TEXTS, datasets.Value("string")),
        "choices": datasets.List(datasets.Value("string")),
        # JSON lists. Messages of one file differ in their keys, and the arguments of tool calls in everything; as text
        # they stay as they are in every version of datasets.
        "messages": datasets.Value("string"),
        "tools": datasets.Value("string"),
    }
)
USED = (*FEATURES, "conversations", "system", "history", "prompt", "completion", "label")

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    # A call stays the text that it is: a template without tools would drop anything else.
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_SPEAKERS = {*_ROLES, *_ROLES.values(), "system", "developer", "function"}
_NEEDED = "a row needs `instruction` and `output`, or `messages`, or `text`"


class UnknownFields(ValueError):
    """A record that none of the formats fits."""


def row_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The row of a record; None for what it does not have.

    Raises:
        ValueError: what is wrong with it, to be put behind the name of its file and its number.
    """
    row: dict[str, Any] = dict.fromkeys(FEATURES)
    row |= _main_part(record)
    row["answer"], row["choices"] = _text(record, "answer") or None, _choices(record.get("choices"))
    if row["messages"] is not None:
        row["tools"] = _tools(record.get("tools"))
    return row


def columns_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as a table with :data:`FEATURES` holds it."""
    said = row["messages"]
    return {**row, "messages": None if said is None else json.dumps(said, ensure_ascii=False)}


def _main_part(record: Mapping[str, Any]) -> dict[str, Any]:
    # Every line of a csv file has every column: an empty one decides only where no other does.
    for nothing in ((None, ""), (None,)):
        filled = {field for field in USED if record.get(field) not in nothing}
        if "messages" in filled:
            return {"messages": _with_system(record, _messages(record["messages"], "messages"))}
        if "conversations" in filled:
            return {"messages": _with_system(record, _messages(record["conversations"], "conversations"))}
        if filled & {"instruction", "output"}:
            return _instruction(record)
        if {"prompt", "completion"} <= filled:
            return _prompt_and_completion(record)
        if "text" in filled:
            return _needed(record, "text")
    raise UnknownFields(f"has none of the needed fields; {_remedy(record)}")


def _instruction(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("history"):
        raise ValueError("has earlier turns in history; write the whole conversation as `messages`")
    row = {"input": _text(record, "input") or None, **_needed(record, "instruction", "output")}
    if record.get("system"):
        row["messages"] = _with_system(record, [dict(message) for message in conversation(row)])
    return row


def _prompt_and_completion(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("label") is False:
        raise ValueError("is a completion that is not to be learnt (label: false, as in KTO); leave such rows out")
    if all(_is_conversation(record[field]) for field in ("prompt", "completion")):
        before = _messages(record["prompt"], "prompt", ends_with_assistant=False)
        return {"messages": before + _messages(record["completion"], "completion")}
    texts = _needed(record, "prompt", "completion")
    return {"instruction": texts["prompt"], "output": texts["completion"]}


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


# ---- text -----------------------------------------------------------------------------------------------------------


def _needed(record: Mapping[str, Any], *fields: str) -> dict[str, Any]:
    """The texts of fields that may not be empty."""
    texts = {field: _text(record, field) for field in fields}
    missing = [field for field, text in texts.items() if not (text or "").strip()]
    if missing:
        states = {field: "empty" if texts[field] is not None else "null" for field in missing if field in record}
        said = ", ".join(f"{field} ({states.get(field, 'not there')})" for field in missing)
        raise ValueError(f"has no text in {said}; {_remedy(record, missing)}")
    return texts


def _text(record: Mapping[str, Any], field: str) -> str | None:
    return as_text(record.get(field), field)


def _choices(value: Any) -> list[str] | None:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, "choices")
    if value is None or value == "":
        return None
    if not isinstance(value, list) or any(choice is None for choice in value):
        raise ValueError(f'has {name_of_type(value)} in choices where a list of texts belongs: ["a", "b"]')
    return [str(as_text(choice, "choices")) for choice in value]


def _tools(value: Any) -> str | None:
    """The tools that a conversation offers, as JSON text; None for none."""
    if isinstance(value, str) and value:
        value = parsed(value, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise ValueError(f"has {name_of_type(value)} in tools where a list of JSON schemas belongs")
    return json.dumps(plain(value, "tools"), ensure_ascii=False)


# ---- messages -------------------------------------------------------------------------------------------------------


def _with_system(record: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages behind the record's own `system`, if it has one and they do not begin with one."""
    text = _text(record, "system")
    return [{"role": "system", "content": text}, *messages] if text and messages[0]["role"] != "system" else messages


def _messages(value: Any, field: str, ends_with_assistant: bool = True) -> list[dict[str, Any]]:
    if isinstance(value, str):
        value = parsed(value, field)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else name_of_type(value)
        raise ValueError(f"has no list in {field}, but {found}; write a list of messages with role and content")
    messages = [_message(message, f"message {index} of {field}") for index, message in enumerate(value)]
    if ends_with_assistant:
        last = messages[-1]
        if last["role"] != "assistant":
            raise ValueError(
                f"does not end with a message from the assistant, but with one of role {last['role']!r}: there is "
                f"nothing to learn behind it; remove it or add the answer"
            )
        if not (last["content"] or "").strip() and not last.get("tool_calls"):
            raise ValueError(f"has no content in its last message ({field}), which is what is to be learnt")
    return messages


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"has {name_of_type(message)} as {where}; write an object with role and content")
    found = {key: value for key, value in message.items() if value is not None}
    role = _role(found, where)
    content = found.get("content", found.get("value"))
    content = _joined(content, where) if isinstance(content, list) else as_text(content, where)
    calls = _tool_calls(found.get("tool_calls"), where)
    # A tool may return nothing, and a call may come without words.
    may_be_empty = bool(calls) if role == "assistant" else role != "user" and content == ""
    if not content and not may_be_empty:
        raise ValueError(f"has a message without role or content: {where} ({role}) has no content; {_keys(message)}")
    more = {
        key: value for key, value in found.items() if key not in ("role", "content", "from", "value", "tool_calls")
    }
    # Many templates write the frame of a call where there is a list, though it be empty.
    more |= {"tool_calls": calls} if calls else {}
    return {"role": role, "content": content, **plain(more, where)}


def _joined(parts: list[Any], where: str) -> str:
    """The text of content that is given as parts."""
    try:
        text_of(parts)
    except ValueError as error:
        raise ValueError(f"has {where}, which {error}") from error
    texts = [part["text"] if isinstance(part, Mapping) else part for part in parts]
    return "".join(str(as_text(text, f"part {index} of {where}")) for index, text in enumerate(texts))


def _tool_calls(value: Any, where: str) -> list[Mapping[str, Any]]:
    """The calls of a message, the arguments of each an object."""
    if isinstance(value, str) and value.strip():
        value = parsed(value, f"tool_calls of {where}")
    if not value:
        return []
    if not isinstance(value, list):
        raise ValueError(f"has {name_of_type(value)} in tool_calls of {where} where a list of calls belongs")
    return [_call(call, f"call {index} of {where}") for index, call in enumerate(value)]


def _call(call: Any, where: str) -> Mapping[str, Any]:
    function = (call.get("function") or call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise ValueError(
            f"has no name of a tool in {where}; write an object with function, and in it name and arguments"
        )
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # What streams of a call without arguments leave is an empty text.
        arguments = parsed(arguments, f"arguments of {where}") if arguments.strip() else {}
        function = {**function, "arguments": arguments}
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ValueError(f"has {name_of_type(arguments)} in arguments of {where} where an object belongs")
    return {**call, "function": function} if call.get("function") else function


def _role(message: Mapping[str, Any], where: str) -> str:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"has a message without role or content: {where} has no role; {_keys(message)}")
    known = role.strip().lower()
    if known in _SPEAKERS:
        return _ROLES.get(known, known)
    if "role" not in message:
        raise ValueError(f"has {where} from {role!r}, who is unknown; write one of {', '.join(sorted(_SPEAKERS))}")
    return role


def _keys(message: Mapping[str, Any]) -> str:
    keys = ", ".join(f"{key} ({'null' if value is None else name_of_type(value)})" for key, value in message.items())
    return f"it has {keys or 'nothing'}; a message needs role and content, or from and value"


# ---- remedies -------------------------------------------------------------------------------------------------------

_LIKELY = {
    "question": "instruction",
    "query": "instruction",
    "input": "instruction",
    "response": "output",
    "completion": "output",
    "target": "output",
    "answer": "output",
    "conversation": "conversations",
    "dialog": "messages",
    "prompt": "instruction",
    "content": "text",
}


def _remedy(record: Mapping[str, Any], missing: list[str] | None = None) -> str:
    """What a row needs, what this one has, and what to rename."""
    found = sorted(str(key) for key, value in record.items() if value is not None)
    said = f"{_NEEDED} (fields found: {', '.join(found) or 'none'})"
    if {"chosen", "rejected"} <= set(found):
        preference = "these are pairs for preference training"
        return f"{said}; {preference}: write `prompt` as `instruction` and `chosen` as `output`"
    renamed = []
    for name in found:
        simple = name.strip().lower()
        better = simple if simple != name and simple in USED else _LIKELY.get(simple)
        if better is not None and better not in found and (missing is None or better in missing):
            renamed.append(f"`{name}` to `{better}`")
    return f"{said}; rename {' and '.join(renamed)}" if renamed else said
