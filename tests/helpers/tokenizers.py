"""Tiny tokenizers of the kinds that there are, each with the chat template of a family of models."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Only the last answer keeps its reasoning block.
REASONING = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
TOOLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}",
)
_WORDS = ("Paris", "the", "is", "capital")


def byte_level(
    chat_template: str | None,
    bos: str = "",
    eos: str = "<|im_end|>",
    merges: tuple[tuple[str, str], ...] = (),
    **more: bool,
) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it, without merges but those given, across all borders of words; with `bos` it begins each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: index for index, name in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not merges)
    tokenizer.decoder = decoders.ByteLevel()
    turns = "<|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <start_of_turn> <end_of_turn>"
    tokenizer.add_special_tokens([*filter(None, (bos, eos)), *turns.split()])
    tokenizer.post_processor = processors.ByteLevel(**more)
    if bos:
        tokenizer.post_processor = _around(tokenizer, bos)
    return _wrapped(tokenizer, chat_template, bos or None, eos)


def sentencepiece(chat_template: str | None, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral have it: spaces are part of words, and a text begins with one."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(33, 127))]
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        for end in range(1, len(word)):
            merges[word[:end], word[end]] = None
            names.append(word[: end + 1])
        merges["▁", word] = None
        names.append("▁" + word)
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    tokenizer.post_processor = _around(tokenizer, "<s>", "</s>" if adds_eos else "")
    return _wrapped(tokenizer, chat_template, "<s>", "</s>")


def _around(tokenizer: Tokenizer, bos: str, eos: str = "") -> processors.TemplateProcessing:
    names = [name for name in (bos, eos) if name]
    return processors.TemplateProcessing(
        single=f"{bos} $A {eos}".strip(), special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )


def _wrapped(tokenizer: Tokenizer, chat_template: str | None, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = chat_template
    return fast
