"""Tokens and labels, against what the tokenizer itself makes of the whole conversation."""

import json
from typing import Any

import pytest
from helpers import tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from launch.data.chat_template import IGNORED_LABEL, Template
from launch.data.formats import row_of
from launch.data.messages import Row, conversation, text_of
from launch.model import cache_dir, load_tokenizer

ROW = {"instruction": "What is 2 and 3?", "output": "2 + 3 = 5. The answer is 5.", "answer": "5"}
CAPITAL = {"instruction": "the capital", "output": "Paris"}


def chat(*turns: tuple[str, Any], **more: Any) -> Row:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


TWO = chat(("system", "Be brief."), ("user", "One?"), ("assistant", "Paris"), ("user", "Two?"), ("assistant", "the"))


def pieces(tokenizer: PreTrainedTokenizerBase, row: Row, kind: str = "auto") -> tuple[list[str], list[str]]:
    """The tokens of a row, and those of them that are trained."""
    ids, labels = Template.choose(tokenizer, kind).encode(row)
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(ids, labels, strict=True))
    names = tokenizer.convert_ids_to_tokens
    return names(ids), names([label for label in labels if label != IGNORED_LABEL])


def trained_text(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    _, labels = Template.choose(tokenizer).encode(row)
    return str(tokenizer.decode([label for label in labels if label != IGNORED_LABEL]))


def answers_of(row: Row) -> list[str]:
    return [message["content"] for message in conversation(row) if message["role"] == "assistant"]


def by_the_tokenizer(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """The tokenizer's own tokens of a conversation."""
    return list(tokenizer.apply_chat_template(conversation(row), tokenize=True, return_dict=False))


# ---- the whole, once ------------------------------------------------------------------------------------------------

FAMILIES = {
    "chatml": (tokenizers.byte_level(tokenizers.CHATML), "<|im_end|>", "\n"),
    "llama3": (tokenizers.byte_level(tokenizers.LLAMA3, bos="<|begin|>", eos="<|eot_id|>"), "<|eot_id|>", ""),
    "zephyr": (tokenizers.sentencepiece(tokenizers.ZEPHYR), "</s>", "\n"),
    "llama2": (tokenizers.sentencepiece(tokenizers.LLAMA2), " </s>", ""),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "row",
    [CAPITAL, TWO, chat(("assistant", "Paris"), ("user", "is"), ("assistant", "the"))],
    ids=["one turn", "two turns", "answer first"],
)
def test_tokens_are_those_of_the_whole_conversation(family: str, row: Row) -> None:
    """But for the line break behind the last turn. Trained is each answer with the template's own end of turn."""
    tokenizer, end, behind = FAMILIES[family]
    ids, _ = Template.choose(tokenizer).encode(row)
    whole = tokenizer.apply_chat_template(conversation(row), tokenize=False)
    assert whole.endswith(end + behind)
    assert ids == tokenizer(whole.removesuffix(behind), add_special_tokens=False)["input_ids"]
    assert by_the_tokenizer(tokenizer, row)[: len(ids)] == ids
    trained = trained_text(tokenizer, row).replace(" ", "")
    assert trained == "".join(answer + end.strip() for answer in answers_of(row))


def test_the_first_trained_token_is_the_one_that_follows_the_prompt() -> None:
    """A word behind a line break is another token than the same word at the start of a text."""
    tokenizer = tokenizers.sentencepiece(tokenizers.ZEPHYR)
    assert pieces(tokenizer, CAPITAL)[1] == ["Paris", "</s>"]
    template = Template.choose(tokenizer)
    assert template.continuation(CAPITAL, "Paris")[1] == tokenizer.convert_tokens_to_ids(["Paris"])
    prompt = tokenizer.apply_chat_template(
        conversation(CAPITAL)[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert template.prompt_ids(CAPITAL) == prompt


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_space_between_prompt_and_answer_is_learnt_with_the_answer(trim_offsets: bool) -> None:
    """Also where the tokenizer's offsets leave out the space, as those of GPT-2 do."""
    tokenizer = tokenizers.byte_level(None, merges=(("Ġ", "P"),), trim_offsets=trim_offsets)
    assert pieces(tokenizer, CAPITAL)[1] == ["ĠP", "a", "r", "i", "s", "<|im_end|>"]
    assert pieces(tokenizer, {**CAPITAL, "output": "42"})[1] == ["Ġ", "4", "2", "<|im_end|>"]
    template = Template.choose(tokenizer)
    # One prompt, whatever the answer.
    assert template.prompt_ids(CAPITAL) == template.prompt_ids({**CAPITAL, "output": "42"})
    assert tokenizer.decode(template.prompt_ids(CAPITAL)) == "User: the capital\n\nAssistant:"
    assert pieces(tokenizers.sentencepiece(None), CAPITAL)[1] == ["▁Paris", "</s>"]


def test_a_token_across_the_border_is_trained() -> None:
    """The answer begins with a line break, which joins the one that ends the prompt."""
    tokenizer = tokenizers.byte_level(tokenizers.CHATML, merges=(("Ċ", "Ċ"),))
    row = {**CAPITAL, "output": "\nHi"}
    assert pieces(tokenizer, row)[1] == ["ĊĊ", "H", "i", "<|im_end|>"]
    ids, labels = Template.choose(tokenizer).encode(row)
    prompt = Template.choose(tokenizer).prompt_ids(row)
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] == ids[len(prompt)] != IGNORED_LABEL
    # And at its end: nothing of the answer is left untrained.
    told = tokenizers.byte_level(
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        merges=((".", "Ċ"),),
    )
    two = chat(("user", "a"), ("assistant", "b."), ("user", "c"), ("assistant", "d."))
    assert pieces(told, two)[1] == ["b", ".Ċ", "d", ".", "<|im_end|>"]


def test_characters_of_several_tokens_keep_their_place() -> None:
    for tokenizer in (tokenizers.byte_level(tokenizers.CHATML), tokenizers.sentencepiece(tokenizers.ZEPHYR)):
        row = {"instruction": "é 😀 \u0627", "output": "ü 😀!"}
        ids, _ = Template.choose(tokenizer).encode(row)
        assert by_the_tokenizer(tokenizer, row)[: len(ids)] == ids
        assert trained_text(tokenizer, row) == "ü 😀!" + tokenizer.eos_token


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"ByT5Tokenizer\) does not tell where its tokens are.*use the fast tokenizer"
    ):
        Template.choose(ByT5Tokenizer())


@pytest.mark.skipif(
    not (cache_dir() / "smollm2-135m").is_dir(), reason="the default model has not been converted here"
)
def test_a_pretrained_tokenizer() -> None:
    tokenizer = load_tokenizer("smollm2-135m")
    for row in (ROW, TWO, {**CAPITAL, "output": "\n\n  x = 1\n"}):
        ids, _ = Template.choose(tokenizer).encode(row)
        assert by_the_tokenizer(tokenizer, row)[: len(ids)] == ids
        answers = "".join(answer + "<|im_end|>" for answer in answers_of(row))
        assert trained_text(tokenizer, row).lstrip("\n") == answers.lstrip("\n")
    ids, labels = Template.choose(tokenizer).encode({"text": "A tale."})
    assert ids == labels == [*tokenizer("A tale.")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_evaluation_takes_the_path_of_training(family: str, kind: str) -> None:
    tokenizer = FAMILIES[family][0]
    template = Template.choose(tokenizer, kind)
    for row in (CAPITAL, TWO, {**CAPITAL, "output": "\nis it"}):
        ids, _ = template.encode(row)
        prompt, answer = template.continuation(row, conversation(row)[-1]["content"])
        assert ids[: len(prompt) + len(answer)] == prompt + answer
        assert prompt == template.prompt_ids(row)
        assert 1 <= len(ids) - len(prompt + answer) <= 2  # the end of turn, in Llama 2 with a space
        another = template.continuation(row, "the capital")
        assert another[1] == template.continuation({"instruction": "?"}, "the capital")[1]
        assert tokenizer.decode(another[1]).strip() == "the capital"


# ---- beginning and end of text --------------------------------------------------------------------------------------

BEGINNINGS = {
    "chat template": tokenizers.byte_level(tokenizers.LLAMA3, bos="<|begin|>", eos="<|eot_id|>"),
    "no chat template": tokenizers.sentencepiece(None),
    "adds both": tokenizers.sentencepiece(None, adds_eos=True),
    "adds both, with chat template": tokenizers.sentencepiece(tokenizers.LLAMA2, adds_eos=True),
    "adds none": tokenizers.byte_level(None),
}


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_text_begins_and_ends_once(kind: str) -> None:
    tokenizer = BEGINNINGS[kind]
    own = tokenizer("the capital")["input_ids"]
    expected = own if own[-1] == tokenizer.eos_token_id else [*own, tokenizer.eos_token_id]
    ids, labels = Template.choose(tokenizer).encode({"text": "the capital"})
    assert ids == expected
    first = 0 if tokenizer.bos_token_id is None else 1
    assert labels == [IGNORED_LABEL] * first + ids[first:]
    # Nothing is doubled in a text that was written with them.
    written = f"{tokenizer.bos_token or ''}the capital{tokenizer.eos_token}"
    ids, _ = Template.choose(tokenizer).encode({"text": written})
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids.count(tokenizer.bos_token_id) == first


@pytest.mark.parametrize("kind", BEGINNINGS)
def test_a_plain_conversation_begins_as_a_text_and_ends_once(kind: str) -> None:
    tokenizer = BEGINNINGS[kind]
    template = Template.choose(tokenizer, "plain")
    for row in (CAPITAL, TWO):
        ids, _ = template.encode(row)
        text = template.render(conversation(row), add_generation_prompt=False).rstrip()
        own = tokenizer(text)["input_ids"]
        assert ids == (own[:-1] if "both" in kind else own)
        assert ids[-1] == tokenizer.eos_token_id
        answers = sum(message["role"] == "assistant" for message in conversation(row))
        assert ids.count(tokenizer.eos_token_id) == answers
        prompt = template.prompt_ids(row)
        assert prompt.count(tokenizer.eos_token_id) == answers - 1
        assert prompt == ids[: len(prompt)]


@pytest.mark.parametrize(
    ("chat_template", "end", "break_"),
    [
        (tokenizers.CHATML, "<|im_end|>", "Ċ"),
        (tokenizers.GEMMA, "<end_of_turn>", "Ċ"),
        (tokenizers.LLAMA3, "<|eot_id|>", ""),
    ],
    ids=["base model with ChatML", "Gemma", "base model with Llama 3's"],
)
def test_end_of_text_follows_the_last_turn_only(chat_template: str, end: str, break_: str) -> None:
    """Where it is not the template's end of turn, which is learnt in every turn."""
    tokenizer = tokenizers.byte_level(chat_template, bos="<bos>", eos="<eos>")
    row = chat(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b"))
    names, trained = pieces(tokenizer, row)
    assert trained == ["a", end, "b", end, "<eos>"]
    assert names[-3:] == ["b", end, "<eos>"]
    own = tokenizer.convert_ids_to_tokens(by_the_tokenizer(tokenizer, row))
    assert names[:-1] + ([break_] if break_ else []) == own


def test_a_template_without_an_end_of_turn_gets_the_end_of_text() -> None:
    told = "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n\n' }}{% endfor %}{% if add_generation_prompt %}### assistant\n{% endif %}"
    tokenizer = tokenizers.byte_level(told, eos="<eos>")
    assert pieces(tokenizer, {**CAPITAL, "output": "x = 1\n"})[1] == ["x", "Ġ", "=", "Ġ", "1", "Ċ", "<eos>"]


BARE = "{% for m in messages %}{{ '\n' + m['role'] + ': ' + m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '\nassistant:' }}{% endif %}"


def test_white_space_at_the_end_of_an_answer_is_trained() -> None:
    for chat_template in (None, tokenizers.CHATML, BARE):
        trained = pieces(tokenizers.byte_level(chat_template), {**CAPITAL, "output": "x\n  \n"})[1]
        assert trained[-6:] == ["x", "Ċ", "Ġ", "Ġ", "Ċ", "<|im_end|>"]


# ---- messages -------------------------------------------------------------------------------------------------------


def test_text_parts_are_joined() -> None:
    parts = chat(
        ("user", [{"type": "text", "text": "the "}, {"type": "text", "text": "capital", "image_url": None}]),
        ("assistant", [{"type": "text", "text": "Paris"}]),
    )
    for tokenizer in (tokenizers.byte_level(tokenizers.CHATML), tokenizers.sentencepiece(None)):
        assert Template.choose(tokenizer).encode(parts) == Template.choose(tokenizer).encode(CAPITAL)
        assert Template.choose(tokenizer).prompt_ids(parts) == Template.choose(tokenizer).prompt_ids(CAPITAL)
    texts = {"": None, "a": "a", "bc": [{"type": "text", "text": "b"}, "c"]}
    assert {text_of(content): content for content in texts.values()} == texts
    assert text_of([]) == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"type": "text", "text": "a"}, {"type": "image_url"}], "message 1 has a part 1 of type 'image_url'"),
        ([{"type": "text", "text": None}], "message 1 has a part 0 of type 'text' without text"),
        ([{"text": "a"}], "message 1 has a part 0 of type None"),
        ([7], "message 1 has a part 0 of type 'int'"),
        (7, "message 1 has content of type int"),
        ({"text": "a"}, "message 1 has content of type dict"),
    ],
)
def test_content_that_is_not_text_is_refused(content: Any, told: str) -> None:
    row = chat(("system", "s"), ("user", content), ("assistant", "Paris"))
    with pytest.raises(ValueError, match=told):
        Template.choose(tokenizers.byte_level(tokenizers.CHATML)).encode(row)


def test_other_keys_of_a_message_reach_the_template_but_for_nothing() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "zip": None}}}
    call_of_a_table = {**call, "id": None, "function": {**call["function"], "strict": None}}
    row = {
        "messages": [
            {"role": "user", "content": "w?", "tool_calls": None, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [call_of_a_table], "name": None},
            {"role": "tool", "content": "21", "tool_calls": None, "name": "weather"},
            {"role": "assistant", "content": "It is 21.", "tool_calls": None, "name": None},
        ]
    }
    assert conversation(row) == [
        {"role": "user", "content": "w?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "21", "name": "weather"},
        {"role": "assistant", "content": "It is 21."},
    ]
    trained = "".join(pieces(tokenizers.byte_level(tokenizers.TOOLS), row)[1])
    assert trained == 'weather({"city":Ġ"Paris",Ġ"zip":Ġnull})<|im_end|>ItĠisĠ21.<|im_end|>'


def calling(arguments: Any, question: str = "w?", content: Any = None) -> Row:
    """A conversation that ends with a call, as it is read from a file."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    answer = {"role": "assistant", "content": content, "tool_calls": [call]}
    return row_of({"messages": [{"role": "user", "content": question}, answer]})


def trained_call(chat_template: str, row: Row) -> str:
    return trained_text(tokenizers.byte_level(chat_template), row)


PARIS = {"city": "Paris", "days": [1, 2.5], "é": True}
PARIS_TEXT = '{"city": "Paris", "days": [1, 2.5], "é": true}'


@pytest.mark.parametrize(
    "written",
    [
        "{{ c.function.arguments | tojson }}",
        "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
        "{{ c.function.arguments }}",  # as if it were text
        "{{ '' + c.function.arguments }}",
    ],
)
def test_arguments_of_a_call_are_trained_as_json_written_once(written: str) -> None:
    """Whether the file has an object or JSON text, and whichever of them the template expects."""
    chat_template = tokenizers.TOOLS.replace("{{ c.function.arguments | tojson }}", written)
    for question in ("w?", str(PARIS), PARIS_TEXT):
        for arguments in (PARIS, json.dumps(PARIS), json.dumps(PARIS, indent=1)):
            assert trained_call(chat_template, calling(arguments, question)) == f"weather({PARIS_TEXT})<|im_end|>"
        assert trained_call(chat_template, calling({}, question)) == "weather({})<|im_end|>"


def test_a_conversation_may_end_with_a_call_alone() -> None:
    row = calling({"city": "Paris"})
    assert trained_call(tokenizers.TOOLS, row) == 'weather({"city": "Paris"})<|im_end|>'
    with_words = calling({"city": "Paris"}, content="Let me see. ")
    assert trained_call(tokenizers.TOOLS, with_words) == 'Let me see. weather({"city": "Paris"})<|im_end|>'
    tokenizer = tokenizers.byte_level(tokenizers.TOOLS)
    prompt = Template.choose(tokenizer).prompt_ids(row)
    assert prompt == Template.choose(tokenizer).encode(row)[0][: len(prompt)]
    assert tokenizer.decode(prompt).endswith("w?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_call_that_is_left_out_is_refused_though_its_tool_is_named_elsewhere(kind: str) -> None:
    with pytest.raises(ValueError, match=f"message 1 calls the tool 'weather', which the {kind} template leaves out"):
        Template.choose(tokenizers.byte_level(tokenizers.CHATML), kind).encode(calling({}, "Ask weather"))


def test_tools_that_a_row_offers_reach_the_template() -> None:
    offering = (
        "{% for t in tools or [] %}<|im_start|>tools\n{{ t.function.name }}<|im_end|>\n{% endfor %}"
        + tokenizers.CHATML
    )
    tokenizer = tokenizers.byte_level(offering)
    schema = {"type": "function", "function": {"name": "weather", "parameters": None}}
    clean = {"type": "function", "function": {"name": "weather"}}
    for tools in ([schema], json.dumps([clean])):
        row = chat(("user", "the capital"), ("assistant", "Paris"), tools=tools)
        ids, _ = Template.choose(tokenizer).encode(row)
        own = tokenizer.apply_chat_template(conversation(row), tools=[clean], tokenize=True, return_dict=False)
        assert own[: len(ids)] == ids
        assert "weather" in tokenizer.decode(ids)
        assert ids[: len(Template.choose(tokenizer).prompt_ids(row))] == Template.choose(tokenizer).prompt_ids(row)
    for nothing in (None, [], "", "[]"):
        row = chat(("user", "the capital"), ("assistant", "Paris"), tools=nothing)
        assert Template.choose(tokenizer).encode(row) == Template.choose(tokenizer).encode(CAPITAL)
    row = chat(("user", "u"), ("assistant", "a"), tools=[schema])
    with pytest.raises(ValueError, match="the row offers the tool 'weather', which the chat template leaves out"):
        Template.choose(tokenizers.byte_level(tokenizers.CHATML)).encode(row)
    not_json = "tools is not valid JSON"
    for wrong, told in (("[", not_json), ("{}x", not_json), (["f"], "tools is a list, not a list of JSON")):
        with pytest.raises(ValueError, match=told):
            Template.choose(tokenizer).encode(chat(("user", "u"), ("assistant", "a"), tools=wrong))


def test_input_is_part_of_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = Template.choose(tokenizer).prompt_ids({**ROW, "input": "A hint."})
    assert "What is 2 and 3?\n\nA hint." in tokenizer.decode(prompt)


def test_special_tokens_in_what_a_user_writes_are_the_tokenizers_affair() -> None:
    tokenizer = tokenizers.byte_level(tokenizers.CHATML)
    row = {**CAPITAL, "instruction": "Say <|im_end|> please"}
    ids, _ = Template.choose(tokenizer).encode(row)
    assert by_the_tokenizer(tokenizer, row)[: len(ids)] == ids
    assert pieces(tokenizer, row)[1] == [*"Paris", "<|im_end|>"]


# ---- templates that refuse, or rewrite -------------------------------------------------------------------------------


def test_a_template_that_refuses_is_quoted() -> None:
    template = Template.choose(tokenizers.byte_level(tokenizers.GEMMA, bos="<bos>", eos="<eos>"))
    refused = r"chat template refuses.*: Conversation roles must alternate.*--template plain"
    for first in ("system", "assistant"):
        with pytest.raises(ValueError, match=refused):
            template.encode(chat((first, "s"), ("user", "u"), ("assistant", "a")))


def test_whatever_a_template_raises_is_a_mistake_of_the_user() -> None:
    for body in ("{{ messages.nothing.at_all }}", "{{ 1 + 'a' }}", "{{ messages[9]['role'] + 'a' }}", "{% for %}"):
        with pytest.raises(ValueError, match="the chat template refuses the conversation: "):
            Template.choose(tokenizers.byte_level(body)).encode(CAPITAL)


def test_an_earlier_turn_that_the_template_rewrites_is_not_trained() -> None:
    tokenizer = tokenizers.byte_level(tokenizers.REASONING)
    template = Template.choose(tokenizer)
    names, trained = pieces(tokenizer, TWO)
    assert "".join(trained) == "<think>ĊĊ</think>ĊĊthe<|im_end|>"
    assert names == tokenizer.convert_ids_to_tokens(by_the_tokenizer(tokenizer, TWO))[:-1]
    assert template.encode_messages(TWO["messages"]).rewritten == 1
    assert "".join(pieces(tokenizer, CAPITAL)[1]) == "<think>ĊĊ</think>ĊĊParis<|im_end|>"
    assert template.encode_messages(conversation(CAPITAL)).rewritten == 0


def test_an_answer_that_is_not_where_it_is_asked_for_is_refused() -> None:
    asking = tokenizers.CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    with pytest.raises(ValueError, match=r"rewrites its generation prompt.*--template plain"):
        Template.choose(tokenizers.byte_level(asking)).encode(CAPITAL)


def test_a_conversation_ends_with_an_answer() -> None:
    with pytest.raises(ValueError, match="does not end with a message from the assistant"):
        Template.choose(tokenizers.byte_level(tokenizers.CHATML)).encode(chat(("assistant", "a"), ("user", "u")))


def test_template_choice(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Template.choose(tokenizer).chat
    assert not Template.choose(tokenizer, "plain").chat
    with pytest.raises(ValueError, match="unknown template"):
        Template.choose(tokenizer, "fancy")
    with pytest.raises(ValueError, match="no chat template; use --template plain"):
        Template.choose(tokenizers.byte_level(None), "chat")
