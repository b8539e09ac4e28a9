"""Chat templates of many habits: what they make of a chat, and what is said where they make nothing of it."""

import datetime
import logging

import numpy as np
import pytest
from tokenizers import processors

from ppow_jax.data import encoding, templates
from ppow_jax.data.conversations import Conversation, Message
from ppow_jax.data.encoding import encode_conversation, encode_prompt, encode_text, tiny_tokenizer
from ppow_jax.data.templates import CHATML_TEMPLATE, render, with_date
from ppow_jax.errors import UserError

DATED = "{%- if strftime_now is defined %}{{ strftime_now('FORMAT') }}{% endif %}|" + CHATML_TEMPLATE
THINK = (  # as of models that always reason: finished answers lose their reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
PARTS = (  # as of models that see images: content is a list
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type == 'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}"
    "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(autouse=True)
def warn_anew():
    for warning in (encoding._warn_header, encoding._warn_reasoning, templates._warn_begin):
        warning.cache_clear()


def with_template(template, tokenizer=None):
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def chat(*contents, reasoning=None):
    turns = [Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents)]
    if reasoning:
        turns[-1] = Message("assistant", turns[-1].content, reasoning)
    return Conversation(tuple(turns), "chats.jsonl:7")


def prompt_of(tokenizer, *contents):
    return tokenizer.decode(encode_prompt(tokenizer, chat(*contents).messages).tolist())


def trained(tokenizer, conversation):
    example = encode_conversation(tokenizer, conversation, 1000)
    edges = np.flatnonzero(np.diff(np.r_[False, example.answer_mask, False])).reshape(-1, 2)
    return [tokenizer.decode(example.tokens[a:b].tolist()) for a, b in edges]


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("%d %b %Y", "05 Feb 2026"),
        ("%-d %B %Y, %A", "5 February 2026, Thursday"),
        ("%Y-%m-%dT%H:%M:%S.%f", "2026-02-05T00:00:00.000000"),
        ("%F %j week %V", "2026-02-05 036 week 06"),
        ("no date", "no date"),
    ],
)
def test_the_date_that_a_template_asks_for(format, text):
    tokenizer = with_template(DATED.replace("FORMAT", format))
    dated = with_date(tokenizer, "2026-02-05")
    assert prompt_of(dated, "hi").partition("|")[0] == text
    assert datetime.date(2026, 2, 5).strftime(format) == text or "%H" in format
    assert not hasattr(tokenizer, "chat_date")  # it stays as it was
    assert prompt_of(with_date(tokenizer, None), "hi").partition("|")[2] == prompt_of(dated, "hi").partition("|")[2]


def test_dates_within_macros_and_variables_and_white_space_before():
    template = (
        "  {% macro head(f) %}[{{ strftime_now(f) }}]{% endmacro %}{% set f = '%Y' %}"
        "{{ head(f) }}{{ strftime_now('%d') | int + 1 }}|" + CHATML_TEMPLATE
    )
    text = prompt_of(with_date(with_template(template), "2026-02-05"), "hi")
    assert text.startswith("[2026]6|<|im_start|>user")
    today = prompt_of(with_template(template), "hi")
    assert today.partition("|")[2] == text.partition("|")[2] and not today.startswith(" ")


def test_a_template_without_dates_does_not_change():
    tokenizer = tiny_tokenizer()
    assert prompt_of(with_date(tokenizer, "2026-02-05"), "hi") == prompt_of(tokenizer, "hi")


def test_generation_prompts_that_finished_answers_do_not_continue(caplog):
    tokenizer = with_template(THINK)
    assert prompt_of(tokenizer, "hi").endswith("<|im_start|>assistant\n<think>\n")
    with caplog.at_level(logging.WARNING):
        found = trained(tokenizer, chat("hi", "<think>\nhm\n</think>hello", "and", "<html> is a tag"))
    assert found == ["hello<|im_end|>", "<html> is a tag<|im_end|>"]
    assert caplog.text.count("ends generation prompts with '<think>'") == 1


def test_reasoning_goes_to_the_template(caplog):
    tokenizer = with_template(REASONING)
    assert trained(tokenizer, chat("hi", "hello", reasoning="hm")) == ["hm\n</think>\n\nhello<|im_end|>"]
    assert trained(tokenizer, chat("hi", "hello")) == ["hello<|im_end|>"]
    with caplog.at_level(logging.WARNING):
        assert trained(tiny_tokenizer(), chat("hi", "hello", reasoning="hm")) == ["hello<|im_end|>"]
    assert "omits the reasoning" in caplog.text


def test_content_as_a_list_of_parts_where_the_template_reads_nothing_else():
    tokenizer = with_template(PARTS)
    assert prompt_of(tokenizer, "hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert trained(tokenizer, chat("hi", "hello")) == ["hello<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no chats today') }}", "chats.jsonl:7: .*refuses it: no chats today"),
        ("{{ 1 / 0 }}", "chats.jsonl:7: .*refuses it: ZeroDivisionError"),
        ("{{ tools | length }}{{ messages[0].content }}", "refuses it: TypeError: .*NoneType"),
        ("{% for tool in tools %}{{ tool.name }}{% endfor %}", "refuses it: TypeError"),
        ("{{ messages[0].content.parts[0].text }}", "refuses it: UndefinedError"),
        ("{{ messages[5].content }}", "refuses it: UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses it: RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "refuses it: OverflowError"),
        ("{{ messages.append(1) }}", "refuses it: SecurityError"),
        ("{% include 'header' %}", "refuses it: TypeError"),
        ("{% if messages %}", "refuses it: TemplateSyntaxError"),
        ("{{ messages | nofilter }}", "refuses it: TemplateAssertionError"),
        ("", "renders|has no chat template"),
        ("\n {# nothing #}", "renders nothing"),
        ("<|im_start|>assistant\n", "cannot be used: it omits the user's text"),
        ("{{ messages[0].content if messages | length == 1 else '-' }}", "omits the user's text"),
        ({"tool_use": CHATML_TEMPLATE}, "multiple chat templates with no default"),
        (17, "cannot be used"),
    ],
)
def test_what_templates_raise_is_one_line(template, reason):
    messages = chat("zebra", "a", "quagga").messages
    tokenizer = with_template(template)
    if template == "":
        assert prompt_of(tokenizer, "hi") == "hi\n\n"  # as good as none
        return
    with pytest.raises(UserError, match=reason) as error:
        encode_prompt(tokenizer, messages, "chats.jsonl:7")
    assert "\n" not in str(error.value) and "'tiny'" in str(error.value)


def test_a_byte_order_mark_of_the_template_s_file_is_no_part_of_it():
    assert prompt_of(with_template("\ufeff" + CHATML_TEMPLATE), "hi") == prompt_of(tiny_tokenizer(), "hi")


def test_the_default_of_several_templates():
    assert prompt_of(with_template({"default": "{{ messages[0].content }}", "rag": "x"}), "hi") == "hi"


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}: {{ 'no' if messages[1] else '' }}", "{{ messages[0].content }}"]
)
def test_a_template_that_leaves_out_the_answer(template):
    with pytest.raises(UserError, match="chats.jsonl:7: the chat template of 'tiny'"):
        encode_conversation(with_template(template), chat("hi", "hello"), 100)


def begins(template=None):
    """A tokenizer that begins every text with its BOS, and ends it, as some do, with its EOS."""
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>", special_tokens=[("<|endoftext|>", 256), ("<|im_end|>", 258)]
    )
    tokenizer.chat_template = template
    return tokenizer


def test_one_token_begins_a_text_that_carries_it_already(caplog):
    tokenizer = begins()
    h, i = tiny_tokenizer()("hi")["input_ids"]
    assert encode_text(tokenizer, "hi").tolist() == encode_text(tokenizer, "<|endoftext|>hi").tolist() == [256, h, i]
    assert encode_text(tokenizer, "hi<|im_end|>").tolist()[-2:] == [258, 258]  # the text's own stays
    plain = [encode_prompt(tokenizer, chat(text).messages).tolist() for text in ("hi", "<|endoftext|>hi")]
    assert plain[0] == plain[1] and plain[0][:3] == [256, h, i] and plain[0].count(256) == 1
    example = encode_conversation(tokenizer, chat("<|endoftext|>hi", "yes"), 100)
    assert example.tokens.tolist().count(256) == 1
    written = "{{ bos_token }}" + CHATML_TEMPLATE
    with caplog.at_level(logging.WARNING):
        text = render(begins(written), chat("<|endoftext|>hi").messages, True, "here")
    assert text == "<|endoftext|><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert "it is removed from them" in caplog.text
    assert encode_prompt(begins(written), chat("hi").messages).tolist().count(256) == 1


def test_texts_with_half_surrogates_are_refused_by_the_tokenizers_name():
    with pytest.raises(
        UserError, match="prompt 3: tokenizer 'tiny' cannot encode its text: it contains half of a surrogate"
    ):
        encode_text(tiny_tokenizer(), "hi \ud83d", "prompt 3")
    with pytest.raises(UserError, match="here: .*half of a surrogate"):
        encode_prompt(tiny_tokenizer(), chat("hi \udce9").messages, "here")
