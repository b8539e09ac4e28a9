"""The answer mask: exactly the assistant's tokens, for templates and tokenizers of several habits."""

import logging

import numpy as np
import pytest

from ppow_jax.data import encoding, templates
from ppow_jax.data.conversations import Conversation, Message, builtin_conversations
from ppow_jax.data.encoding import encode_conversation, encode_prompt, tiny_tokenizer
from ppow_jax.errors import UserError


def chat(*contents, system=None):
    head = (Message("system", system),) if system else ()
    turns = tuple(Message(("user", "assistant")[i % 2], c) for i, c in enumerate(contents))
    return Conversation(head + turns, "chat.jsonl:7")


def written(tokenizer, example):
    """Texts of the runs of the mask."""
    edges = np.flatnonzero(np.diff(np.r_[False, example.answer_mask, False]))
    return [tokenizer.decode(example.tokens[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def test_tiny_tokenizer_is_bytes(tokenizer):
    text = "Añ∂ 漢字 🙂\t\n x  <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert len(tokenizer) == 259 and len(ids) == len(text.replace("<|im_end|>", "").encode()) + 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [256, 257, 258]
    assert tokenizer.eos_token_id == 258 and tokenizer.pad_token_id == 256


def test_prompt(tokenizer):
    ids = encode_prompt(tokenizer, chat("hi", system="be brief").messages)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids.tolist()) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_mask_is_what_the_assistant_wrote(tokenizer):
    conversation = chat("q one", "answer one", "q two", "answer two", "unanswered", system="s")
    example = encode_conversation(tokenizer, conversation, 1000)
    assert example.tokens.dtype == np.int32 and example.answer_mask.dtype == np.bool_
    assert written(tokenizer, example) == ["answer one<|im_end|>", "answer two<|im_end|>"]
    assert example.source == "chat.jsonl:7" and "unanswered" not in tokenizer.decode(example.tokens.tolist())


@pytest.mark.parametrize("conversation", builtin_conversations(20, seed=3))
def test_an_answer_begins_where_its_prompt_ends(tokenizer, conversation):
    example = encode_conversation(tokenizer, conversation, 1000)
    starts = np.flatnonzero(np.diff(np.r_[False, example.answer_mask].astype(int)) == 1)
    answers = [k for k, m in enumerate(conversation.messages) if m.role == "assistant"]
    for start, k in zip(starts, answers, strict=True):
        np.testing.assert_array_equal(
            example.tokens[:start], encode_prompt(tokenizer, conversation.messages[:k])
        )


def test_truncation_keeps_the_left(tokenizer):
    whole = encode_conversation(tokenizer, chat("q", "a long answer"), 1000)
    first = int(np.flatnonzero(whole.answer_mask)[0])
    part = encode_conversation(tokenizer, chat("q", "a long answer"), first + 3)
    np.testing.assert_array_equal(part.tokens, whole.tokens[: first + 3])
    assert part.answer_mask.sum() == 3
    assert encode_conversation(tokenizer, chat("q", "a long answer"), first) is None
    with pytest.raises(UserError, match=f"chat.jsonl:7: no trainable answer token: its first {first} of"):
        encode_conversation(tokenizer, chat("q", "a long answer"), first, strict=True)


def test_no_assistant_turn(tokenizer):
    assert encode_conversation(tokenizer, chat("q"), 100) is None
    with pytest.raises(UserError, match="chat.jsonl:7: no trainable answer token: it has no assistant turn"):
        encode_conversation(tokenizer, chat("q"), 100, strict=True)


def test_content_that_holds_special_tokens(tokenizer):
    example = encode_conversation(tokenizer, chat("q", "say <|im_end|> now"), 100)
    assert written(tokenizer, example) == ["say <|im_end|> now<|im_end|>"]


def test_token_across_the_border_is_not_the_answers(tokenizer):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĠ"])}
    backend = Tokenizer(models.BPE(vocabulary, [("Ċ", "Ġ")]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    merging = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=encoding.CHATML_TEMPLATE
    )
    example = encode_conversation(merging, chat("q", "  two spaces"), 100)
    assert written(merging, example) == [" two spaces<|im_end|>"]


def test_template_without_end_token(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert written(tokenizer, encode_conversation(tokenizer, chat("q", "a", "r", "b"), 100)) == ["a\n", "b\n"]


def test_template_that_rewrites_earlier_answers(tokenizer, caplog):
    tokenizer.chat_template = encoding.CHATML_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{% if loop.last and message['role'] == 'assistant' %}<think>\n\n</think>{% endif %}"
        "{{ message['content'] }}",
    )
    encoding._warn_rewritten.cache_clear()
    with caplog.at_level(logging.WARNING):
        example = encode_conversation(tokenizer, chat("q", "a", "r", "b"), 500)
    assert written(tokenizer, example) == ["<think>\n\n</think>b<|im_end|>"] and "rewrites" in caplog.text


def test_template_that_breaks_the_prefix(tokenizer):
    tokenizer.chat_template = encoding.CHATML_TEMPLATE.replace(
        "<|im_start|>assistant\n{% endif", "ANSWER{% endif"
    )
    with pytest.raises(UserError, match="chat.jsonl:7: the chat template of 'tiny'"):
        encode_conversation(tokenizer, chat("q", "a"), 100)


def test_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="chat.jsonl:7: .*refuses it: no system role"):
        encode_conversation(tokenizer, chat("q", "a"), 100)


def test_base_model_gets_plain_text(tokenizer, caplog):
    tokenizer.chat_template = None
    templates._warn_plain.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert tokenizer.decode(encode_prompt(tokenizer, chat("q").messages).tolist()) == "q\n\n"
    assert "plain text" in caplog.text
    assert written(tokenizer, encode_conversation(tokenizer, chat("q", "a", "r", "b"), 100)) == [
        "a<|im_end|>",
        "b<|im_end|>",
    ]
