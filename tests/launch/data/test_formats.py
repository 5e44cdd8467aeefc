import datetime
import json
from decimal import Decimal
from typing import Any

import datasets
import pytest

from launch.data.formats import FEATURES, columns_of, row_of
from launch.data.messages import conversation, offered_tools
from launch.data.records import parse_json

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ARGUMENTS = {"x": 1, "y": 1.5, "z": None}
CALL = {"type": "function", "function": {"name": "f", "arguments": ARGUMENTS}}
TEXT = {"type": "text", "text": "q"}


def calls(*before: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """A message that calls f, behind other calls."""
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [*before, call]}


def filled(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row_of(record).items() if value is not None}


def from_json(text: str) -> dict[str, Any]:
    return filled(parse_json(text))


# ---- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "row"),
    [
        ({"instruction": "q", "input": "i", "output": "a", "id": 7}, {"instruction": "q", "input": "i", "output": "a"}),
        ({"instruction": "q", "input": "", "output": "a", "answer": ""}, {"instruction": "q", "output": "a"}),
        ({"prompt": "q", "completion": "a", "answer": 5}, {"instruction": "q", "output": "a", "answer": "5"}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, {"messages": [USER, ASSISTANT]}),
        ({"messages": [USER, ASSISTANT], "prompt": "q"}, {"messages": [USER, ASSISTANT]}),
        ({"messages": json.dumps([USER, ASSISTANT])}, {"messages": [USER, ASSISTANT]}),
        ({"messages": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, {"messages": [USER, ASSISTANT]}),
        ({"text": "t", "prompt": "q"}, {"text": "t"}),
        ({"instruction": "", "output": "", "messages": "", "text": "t"}, {"text": "t"}),
        ({"instruction": "q", "output": "a", "choices": ["a", 2]}, {"instruction": "q", "output": "a", "choices": ["a", "2"]}),
        ({"instruction": "q", "output": "a", "choices": '["a", "b"]'}, {"instruction": "q", "output": "a", "choices": ["a", "b"]}),
    ],
)  # fmt: skip
def test_every_form_becomes_a_row(record: dict[str, Any], row: dict[str, Any]) -> None:
    assert filled(record) == row


def test_a_system_prompt_beside_the_messages_comes_first() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert filled({"system": "Be brief.", "messages": [USER, ASSISTANT]})["messages"] == [system, USER, ASSISTANT]
    row = {"instruction": "q", "input": "i", "output": "a"}
    messages = [system, {"role": "user", "content": "q\n\ni"}, ASSISTANT]
    assert filled({"system": "Be brief.", "history": [], **row}) == {**row, "messages": messages}
    assert filled({"system": "Other.", "messages": [system, USER, ASSISTANT]})["messages"] == [system, USER, ASSISTANT]


def test_sharegpt_turns_get_the_roles_of_chat_templates() -> None:
    said = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "user": "user"}
    said |= {"model": "assistant", "tool": "tool", "assistant": "assistant"}
    turns = [{"from": speaker, "value": f"by {speaker}", "weight": None} for speaker in said]
    assert filled({"system": "Be brief.", "conversations": turns})["messages"] == [
        {"role": "system", "content": "Be brief."},
        *({"role": role, "content": f"by {speaker}"} for speaker, role in said.items()),
    ]


def test_tool_calls_are_passed_on_with_the_types_of_their_arguments() -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": ""}]
    text = json.dumps({"messages": [*messages, {**ASSISTANT, "weight": 1}]})
    assert from_json(text)["messages"] == [*messages, {**ASSISTANT, "weight": 1}]


@pytest.mark.parametrize("text", [json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, indent=2)])
def test_arguments_that_are_json_text_become_the_object(text: str) -> None:
    expected = [USER, calls(arguments=ARGUMENTS), {"role": "tool", "content": "1"}, ASSISTANT]
    messages = [USER, calls(arguments=text), *expected[2:]]
    assert from_json(json.dumps({"messages": messages}))["messages"] == expected
    as_text = [USER, {**messages[1], "tool_calls": json.dumps(messages[1]["tool_calls"])}, *expected[2:]]
    assert filled({"messages": as_text})["messages"] == expected
    bare = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": text}]}
    read = filled({"messages": [USER, bare, ASSISTANT]})["messages"][1]
    assert read == {**bare, "tool_calls": [{"name": "f", "arguments": ARGUMENTS}]}


def test_a_call_may_have_no_arguments_and_no_words() -> None:
    assert filled({"messages": [USER, calls(arguments="")]})["messages"][1] == calls(arguments={})
    bare = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert filled({"messages": [USER, bare]})["messages"][1] == bare
    for content in (None, "", " "):
        last = {**calls(arguments={"x": 1}), "content": content}
        assert filled({"messages": [USER, last]})["messages"] == [USER, last]
    messages = [{**USER, "tool_calls": []}, {**ASSISTANT, "tool_calls": []}]
    assert filled({"messages": messages})["messages"] == [USER, ASSISTANT]


def test_text_parts_become_one_text() -> None:
    text = '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a "}, "b", {"type": "text", "text": 1.50}]}, {"role": "assistant", "content": "a"}]}'
    assert from_json(text)["messages"] == [{"role": "user", "content": "a b1.50"}, ASSISTANT]


def test_roles_are_known_however_they_are_written() -> None:
    for keys in (("from", "value"), ("role", "content")):
        for names in (("Human", "GPT"), ("USER", "Assistant"), ("user ", " Model")):
            messages = [dict(zip(keys, turn, strict=True)) for turn in zip(names, "qa", strict=True)]
            assert filled({"messages": messages})["messages"] == [USER, ASSISTANT]
    assert filled({"messages": [{"role": "Critic", "content": "c"}, ASSISTANT]})["messages"][0]["role"] == "Critic"


def test_a_table_keeps_messages_whose_keys_differ() -> None:
    rows = [
        row_of({"messages": [USER, ASSISTANT]}),
        row_of({"messages": [USER, {**ASSISTANT, "content": None, "tool_calls": [CALL]}, ASSISTANT]}),
        row_of({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]}),
        row_of({"text": "t"}),
    ]
    table = datasets.Dataset.from_list([columns_of(row) for row in rows], features=FEATURES)
    assert [conversation(row) for row in table if row["messages"]] == [conversation(row) for row in rows[:3]]
    assert [{**row, "messages": None} for row in table] == [{**row, "messages": None} for row in rows]
    assert json.loads(table[1]["messages"]) == rows[1]["messages"]


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("0", "0"),
        ("1.50", "1.50"),
        ("12345678901234567", "12345678901234567"),
        ("1" + "0" * 30, "1" + "0" * 30),
        ("true", "true"),
        ("false", "false"),
        ('"None"', "None"),
        ('"NA"', "NA"),
        ('"2024-01-05T10:00:00Z"', "2024-01-05T10:00:00Z"),
        ('"a\\u0000b"', "a\0b"),
        ('"\\ud83d\\ude00"', "😀"),
    ],
)
def test_json_values_become_their_text(literal: str, text: str) -> None:
    row = from_json(f'{{"instruction": "q", "input": {literal}, "output": {literal}, "answer": {literal}}}')
    assert row == {"instruction": "q", "input": text, "output": text, "answer": text}
    assert from_json(f'{{"messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": {literal}}}]}}')[
        "messages"
    ] == [USER, {"role": "assistant", "content": text}]  # fmt: skip


def test_values_of_a_table_become_text() -> None:
    texts = {5: "5", 0.5: "0.5", True: "true", Decimal("1.50"): "1.50", "é".encode(): "é"}
    for value, text in {**texts, datetime.date(2024, 1, 5): "2024-01-05"}.items():
        assert filled({"instruction": "q", "output": value})["output"] == text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["b", "a"], "has a list in input where a text belongs; write it as the model should read it"),
        ({"x": 1}, "has an object in input where a text belongs"),
        (float("nan"), r"has nan \(not a number\) in input where a text belongs; write null for nothing"),
        (parse_json("NaN"), r"has NaN \(not a number\) in input where a text belongs; write null for nothing"),
        (parse_json("-Infinity"), r"has -Infinity \(not a number\) in input"),
        (datetime.datetime(2024, 1, 5), "has a value of type datetime in input where a text belongs"),
        (b"caf\xe9", "has bytes in input that are not text in utf-8; write it as a string"),
        ("cut \ud83d", r"has half a character \(\\ud83d, a surrogate without its pair\) in input; .*mend or remove"),
    ],
)
def test_what_is_no_text_is_refused_with_its_type(value: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        row_of({"instruction": "q", "input": value, "output": "a"})


def test_what_is_not_used_is_not_judged() -> None:
    assert filled({"text": "t", "score": float("nan"), "meta": {"a": [1]}, "input": ["x"]}) == {"text": "t"}


@pytest.mark.parametrize("choices", [{"text": ["a"], "label": ["A"]}, "a|b", ["a", None], [["a"]]])
def test_choices_are_a_list_of_texts(choices: Any) -> None:
    with pytest.raises(ValueError, match="in choices where"):
        row_of({"instruction": "q", "output": "a", "choices": choices})


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "q"}, r"no text in output \(not there\); .*found: instruction\)$"),
        ({"instruction": "q", "output": None}, r"no text in output \(null\); .*found: instruction\)$"),
        ({"instruction": "q", "output": " "}, r"no text in output \(empty\); .*found: instruction, output\)$"),
        ({"instruction": ""}, r"no text in instruction \(empty\), output \(not there\)"),
        ({"output": "a"}, r"no text in instruction \(not there\)"),
        ({"input": "q", "output": "a"}, "no text in instruction .*rename `input` to `instruction`"),
        ({"instruction": "q", "response": "a"}, "no text in output .*rename `response` to `output`"),
        ({"prompt": "q", "completion": ""}, r"no text in completion \(empty\)"),
        ({"prompt": "q", "completion": ["a"]}, "a list in completion where a text belongs"),
        ({"prompt": "q", "completion": "a", "label": False}, "not to be learnt .label: false, as in KTO.; leave such"),
        (
            {"instruction": "q", "output": "a", "history": [["q", "a"]]},
            "earlier turns in history; write .* `messages`",
        ),
        ({"prompt": "q", "response": "a"}, "rename `prompt` to `instruction` and `response` to `output`"),
        ({"question": "q", "answer": "a"}, "answer, question.; rename `answer` to `output` and `question` to"),
        ({"Instruction": "q", "Output": "a"}, "rename `Instruction` to `instruction` and `Output` to `output`"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "rejected.; these are pairs for preference training: write ",
        ),
        ({}, r"none of the needed fields; .*\(fields found: none\)"),
    ],
)
def test_a_missing_field_is_named_with_what_is_there(record: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^(has|is) .*{expected}"):
        row_of(record)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "no list in messages, but an empty list"),
        ({"role": ["user"], "content": ["q"]}, "no list in messages, but an object"),
        ("[{'role': 'user'}]", r"text in messages that is not JSON \(.*\); write it with json.dumps"),
        (["q", "a"], "a text as message 0 of messages; write an object with role and content"),
        ([{"content": "q"}, ASSISTANT], r"message 0 of messages has no role; it has content \(a text\); a message needs"),
        ([{"speaker": "user", "text": "q"}], r"message 0 of messages has no role; it has speaker .*or from and value"),
        ([{"from": "alice", "value": "q"}, ASSISTANT], "message 0 of messages from 'alice', who is unknown; write one of"),
        ([{"role": "user", "content": None}, ASSISTANT], r"message 0 of messages \(user\) has no content; .*content \(null\)"),
        ([USER, {"role": "assistant", "content": ""}, ASSISTANT], r"message 1 of messages \(assistant\) has no content"),
        ([{"role": "user", "content": {"a": 1}}, ASSISTANT], "an object in message 0 of messages where a text belongs"),
        ([USER], "does not end with a message from the assistant, but with one of role 'user'"),
        ([USER, {"role": "assistant", "content": " "}], "no content in its last message"),
        ([USER, {"role": "assistant", "tool_calls": []}], r"message 1 of messages \(assistant\) has no content"),
        ([USER, {**ASSISTANT, "tool_calls": "f()"}], r"text in tool_calls of message 1 of messages that is not JSON"),
        ([USER, {**ASSISTANT, "tool_calls": CALL}], "an object in tool_calls of message 1 of messages where a list of calls"),
        ([USER, {**ASSISTANT, "tool_calls": ["f"]}], "no name of a tool in call 0 of message 1 of messages"),
        ([USER, {**ASSISTANT, "tool_calls": [{"type": "function"}]}], "no name of a tool in call 0 of message 1 of messages"),
        ([USER, calls(CALL, arguments="x=1")], r"text in arguments of call 1 of message 1 of messages that is not JSON"),
        ([USER, calls(CALL, arguments="[1]")], "a list in arguments of call 1 of message 1 of messages where an object"),
        ([USER, calls(CALL, arguments="7")], "a number in arguments of call 1 of message 1 of messages where an object"),
        ([USER, calls(arguments='{"x": NaN}')], r"NaN \(not a number\) in message 1 of messages"),
        ([{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": "x"}]}, ASSISTANT],
         "message 0 of messages, which has a part 1 of type 'image_url'; only parts of type 'text' can be trained on"),
        ([{"role": "user", "content": [{"type": "text"}]}, ASSISTANT], "message 0 of messages, which has a part 0 of type 'text' without"),
        ([{"role": "user", "content": [TEXT, float("nan")]}, ASSISTANT], "message 0 of messages, which has a part 1 of type 'float'"),
        ([{"role": "user", "content": [TEXT, parse_json("NaN")]}, ASSISTANT], "NaN .not a number. in part 1 of message 0 of messages"),
        ([USER, {"role": "assistant", "content": [{"type": "text", "text": " "}]}], "no content in its last message"),
        ([{"role": "user", "content": [{"type": "text", "text": ""}]}, ASSISTANT], r"message 0 of messages \(user\) has no content"),
        ([{"role": "user", "content": "\ud83d"}, ASSISTANT], "half a character .* in message 0 of messages"),
        ([{**USER, "x": ["\ud83d"]}, ASSISTANT], "half a character .* in message 0 of messages"),
        ([{**USER, "x": float("nan")}, ASSISTANT], "not a number"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_used_are_named(messages: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=f"^has .*{expected}|^{expected}"):
        row_of({"messages": messages})


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "maximum": 3}}}


def test_the_tools_that_a_conversation_offers_are_kept() -> None:
    for tools in ([TOOL], json.dumps([TOOL])):
        row = row_of({"messages": [USER, ASSISTANT], "tools": tools})
        assert json.loads(row["tools"]) == [TOOL]
        assert offered_tools(row) == (TOOL,)
    for nothing in (None, "", []):
        assert row_of({"messages": [USER, ASSISTANT], "tools": nothing})["tools"] is None


def test_what_is_null_in_calls_and_schemas_is_null_for_the_template() -> None:
    """Where the file says so; a table's own nulls are gone when it has been read."""
    schema = {"type": "function", "function": {"name": "f", "parameters": {"default": None, "enum": [None, 1]}}}
    text = json.dumps({"messages": [USER, calls(arguments='{"x": null, "y": [null]}')], "tools": [schema]})
    row = next(iter(datasets.Dataset.from_list([columns_of(row_of(parse_json(text)))], features=FEATURES)))
    assert offered_tools(row) == (schema,)
    assert conversation(row)[-1]["tool_calls"][0]["function"]["arguments"] == {"x": None, "y": [None]}


@pytest.mark.parametrize(("tools", "said"), [("{", "not JSON"), ({"f": 1}, "an object"), ([1], "a list")])
def test_tools_that_are_no_list_of_schemas_are_refused(tools: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said + ".*in tools|in tools.*" + said):
        row_of({"messages": [USER, ASSISTANT], "tools": tools})
