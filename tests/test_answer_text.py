"""Texts of answers behind their prompts, streamed or not, and stop texts that are special tokens."""

import random

import pytest
from gguf_files import sentencepiece
from sentencepiece_reference import random_text

from ppow_jax.data.encoding import encode_text, tiny_tokenizer
from ppow_jax.errors import UserError
from ppow_jax.inference.answer_text import AnswerText, split_stops
from ppow_jax.inference.model import Model
from ppow_jax.weights import targets
from ppow_jax.weights.gguf_tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return load_tokenizer(sentencepiece(tmp_path_factory.mktemp("spm") / "m.gguf"))


def decode(tokenizer, ids):
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def test_prompt_and_answer_make_the_whole(spm):
    """At each place where a text's tokens may be cut, and with more tokens of the prompt than are looked at."""
    rng = random.Random(0)
    for _ in range(60):
        ids = spm(random_text(rng, "aabbcde  n", 120))["input_ids"]
        for cut in range(1, len(ids)):
            prompt, answer = ids[:cut], ids[cut:]
            assert decode(spm, prompt) + AnswerText(spm, prompt).decode(answer) == decode(spm, ids)


def test_a_leading_blank_is_kept_behind_text_and_dropped_at_the_start(spm):
    answer = spm("de", add_special_tokens=False)["input_ids"]
    assert AnswerText(spm, spm("ab")["input_ids"]).decode(answer) == " de"
    assert AnswerText(spm, [1]).decode(answer) == AnswerText(spm, []).decode(answer) == "de"
    special = spm("ab")["input_ids"] + [2, 1] * 40  # the last tokens that have text lie far back
    assert AnswerText(spm, special).decode(answer) == " de"


@pytest.mark.parametrize("text", ["a\u4e16\u754cb", "\u4e16\u754c\u4e16\u754c", "\u00e9\u00e9 \U0001f600"])
def test_characters_of_several_tokens(spm, text):
    """Text that was given out stays, and a character that the prompt begins belongs to the answer."""
    for tokenizer in (spm, tiny_tokenizer()):
        ids = tokenizer(text + "b")["input_ids"]
        for cut in range(1, len(ids)):
            answer, shown = AnswerText(tokenizer, ids[:cut]), ""
            for count in range(len(ids) - cut + 1):
                now = answer.settled(ids[cut : cut + count])
                assert now.startswith(shown)
                shown = now
            head = decode(tokenizer, ids[:cut]).rstrip("\ufffd")
            assert shown == answer.decode(ids[cut:])
            assert (text + "b").endswith(shown) and len(head) + len(shown) >= len(text) + 1


def test_bytes_wait_for_another_token(spm):
    """Decoded together, bytes of which one fits in no character all become its sign."""
    a, minus, bad, b = (spm.convert_tokens_to_ids(token) for token in ("a", "<0x2D>", "<0x80>", "b"))
    answer = AnswerText(spm, spm("a")["input_ids"])
    assert [answer.settled(ids) for ids in ([a], [a, minus], [a, minus, bad])] == ["a"] * 3
    assert answer.settled([a, minus, bad, b]) == answer.decode([a, minus, bad, b]) == "a\ufffd\ufffdb"
    assert answer.settled([a, minus, b]) == "a-b" and answer.settled([a, minus, 2, bad]) == "a"


def test_streamed_pieces_make_the_text(tmp_path):
    target = targets.load(str(sentencepiece(tmp_path / "m.gguf")), "float32")
    model = Model(target)
    for prompt in ("abc de", "a b \u4e16e", "</s>"):
        for seed in range(3):
            stream = model.stream(prompt, max_new_tokens=24, temperature=2.0, seed=seed)
            text = "".join(stream)
            result = stream.result
            assert text == result.text
            whole = decode(target.tokenizer, result.prompt_ids + result.token_ids)
            head = decode(target.tokenizer, result.prompt_ids)
            assert head + result.text == whole


# ---------------------------------------------------------------- stop texts


def test_stop_texts_that_are_special_tokens():
    tokenizer = tiny_tokenizer()
    assert split_stops(tokenizer, ("a", "<|im_end|>", "\n", "<|im_start|>"), "prompt") == (("a", "\n"), (258, 257))
    assert split_stops(tokenizer, (), "prompt") == ((), ())
    tokenizer.add_tokens(["<shown>"])
    assert split_stops(tokenizer, ("<shown>", "x<shown>"), "prompt") == (("<shown>", "x<shown>"), ())


@pytest.mark.parametrize("stop", ["<|im_end|>\n", "x<|im_end|>", "<|im_start|><|im_end|>"])
def test_stop_texts_with_special_tokens_in_them(stop):
    with pytest.raises(UserError, match=r"prompt 1: stop=.*contains a special token.*give that alone: '<\|im_"):
        split_stops(tiny_tokenizer(), (stop,), "prompt 1")


def test_answers_end_at_a_special_stop_token(tmp_path):
    """Whichever of several stops comes first; the text ends before it."""
    target = targets.load(str(sentencepiece(tmp_path / "m.gguf", extra=["<stop>"])), "float32")
    target.tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>", "a"]})
    stop_id = target.tokenizer.convert_tokens_to_ids("a")
    model = Model(target)
    for seed in range(30):
        plain = model.generate("abc de", max_new_tokens=40, temperature=2.0, seed=seed)[0]
        if stop_id in plain.token_ids[2:]:
            break
    at = plain.token_ids.index(stop_id)
    text = plain.text
    result = model.generate("abc de", max_new_tokens=40, temperature=2.0, seed=seed, stop=["a", "no such text"])[0]
    assert (result.token_ids, result.finish_reason) == (plain.token_ids[: at + 1], "stop")
    assert text.startswith(result.text) and result.text == AnswerText(target.tokenizer, plain.prompt_ids).decode(
        plain.token_ids[:at]
    )
    before = next(text[i : i + 2] for i in range(len(text)) if text[i : i + 2].strip("a") == text[i : i + 2])
    early = model.generate("abc de", max_new_tokens=40, temperature=2.0, seed=seed, stop=["a", before])[0]
    assert early.text == text[: text.index(before)] and early.finish_reason == "stop"
    assert "".join(model.stream("abc de", max_new_tokens=40, temperature=2.0, seed=seed, stop="a")) == result.text


# ---------------------------------------------------------------- prompts


def test_no_second_bos(spm):
    once = spm("ab")["input_ids"]
    assert once[0] == 1 and encode_text(spm, "ab").tolist() == once
    assert encode_text(spm, "<s>ab").tolist() == once and spm("<s>ab")["input_ids"] == [1, *once]
    assert encode_text(spm, "<s><s>ab").tolist() == [1, *once]  # as it was written
    tokenizer = tiny_tokenizer()
    assert encode_text(tokenizer, "<|im_start|>a").tolist() == tokenizer("<|im_start|>a")["input_ids"]
    assert encode_text(tokenizer, "").tolist() == []
