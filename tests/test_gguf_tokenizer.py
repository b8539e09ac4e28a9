"""Tokenizers of GGUF files: rules that cut text into words, SentencePiece, equal texts, BOS tokens."""

import logging
import random

import pytest
from gguf_files import BYTES, PIECES, SCORES, SPECIAL, byte_level, sentencepiece
from sentencepiece_reference import encode, random_text

from ppow_jax.errors import UserError
from ppow_jax.weights.gguf_pretokenizers import RULES
from ppow_jax.weights.gguf_tokenizer import load_tokenizer

# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("pre", "count"),
    [
        *(("llama-bpe", 1), ("llama3", 1), ("llama-v3", 1), ("falcon3", 1), ("pixtral", 1), ("tekken", 1)),
        *(("gpt-2", 3), ("qwen2", 3), ("smollm", 3), ("smaug-bpe", 3), ("deepseek-v3", 3)),
    ],
)
def test_whole_words_are_looked_up_before_merges(tmp_path, pre, count):
    """abc is a token that no merges make."""
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", ["abc", "xy"], pre=pre, merges=["x y"]))
    assert len(tokenizer("abc", add_special_tokens=False)["input_ids"]) == count
    text = "abc xy12 \u00e9"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


WORDS = {
    "gpt-2": ["I", "'ll", " see", " 12345", " THINGS", "!!", "\n", " a"],
    "smollm": ["I", "'ll", " see", " ", "1", "2"],
    "llama-bpe": ["I", "'LL", " see", " ", "123", "45", "?!\n\n", " a"],
    "qwen2": ["I", "'LL", " see", " ", "1", "2", "3", "?!\n\n", " a"],
    "tekken": ["Hello", "World", " ABCdef", " ", "1", "2", "/x"],
    "deepseek-coder": ["\n", " see", " ", "1", "2", "\u4e16\u754c", "!?"],
    "deepseek-v3": [" ", "123", "45", " see", "\u4e16\u754c", "?!\n\n"],
    "seed-coder": ["I", "'LL", " ", "1", "2", "?!", "\n\n", " a"],
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_of_a_rule(pre):
    words = [word for word, _ in RULES[pre].build().pre_tokenize_str("".join(WORDS[pre]))]
    plain = [bytes(BYTE_OF[char] for char in word).decode() for word in words]
    assert plain == WORDS[pre]


def _byte_of() -> dict[str, int]:
    """The byte of each letter of byte-level BPE: printable ones for themselves, the others in order from 256."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_of()


@pytest.mark.parametrize(("pre", "joined"), [("qwen2", True), ("deepseek-r1-qwen", True), ("llama-bpe", False)])
def test_composed_characters(tmp_path, pre, joined):
    """Qwen's tokenizers put text into Unicode's composed form, Llama's do not."""
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre=pre))
    decomposed, composed = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("e\u0301", "\u00e9"))
    assert (decomposed == composed) == joined


@pytest.mark.parametrize(
    ("architecture", "pre", "extra", "rule", "tokens"),
    [
        ("qwen2", None, (), "qwen2", 5),
        ("qwen3", "default", (), "qwen2", 5),
        ("llama", None, (), "gpt-2", 4),
        ("llama", None, ("<|eot_id|>",), "llama-bpe", 4),
        ("llama", "default", (), "gpt-2", 4),
    ],
)
def test_a_rule_that_is_not_named_is_guessed_aloud(tmp_path, caplog, architecture, pre, extra, rule, tokens):
    path = byte_level(
        tmp_path / "m.gguf", ["12", *extra], [1] + [3] * len(extra), architecture, pre=pre, merges=["1 2"]
    )
    tokenizer = load_tokenizer(path)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert repr(rule) in line and "tokenizer.ggml.pre" in line
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == tokens


def test_an_unknown_rule_is_refused_with_what_can_be_done(tmp_path):
    with pytest.raises(
        UserError, match=r"'viking' is not supported \(supported: .*llama-bpe.*original model's directory"
    ):
        load_tokenizer(byte_level(tmp_path / "m.gguf", pre="viking"))


def test_missing_bytes_are_said(tmp_path, caplog):
    bytes_ = [char for char in BYTES if char not in "ab\u00ff"]  # 0xFF is in no text
    tokens = [*bytes_, "he", *SPECIAL]
    path = byte_level(
        tmp_path / "m.gguf", tokens=tokens, token_type=[1] * 254 + [3, 3], bos_token_id=254, eos_token_id=255
    )
    load_tokenizer(path)
    assert "2 bytes have no token, characters that contain them are lost: 0x61, 0x62" in caplog.text


# ---------------------------------------------------------------- special tokens


@pytest.mark.parametrize(
    ("pre", "says", "begins"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_texts_begin_with_bos_where_the_file_says_so(tmp_path, pre, says, begins):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre=pre, add_bos_token=says))
    ids = tokenizer("hi")["input_ids"]
    assert (ids[0] == 256) == begins and len(ids) == 2 + begins
    assert tokenizer("hi", add_special_tokens=False)["input_ids"] == ids[begins:]


@pytest.mark.parametrize("none", [None, 2**32 - 1])
def test_bos_that_is_not_named(tmp_path, caplog, none):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", add_bos_token=True, bos_token_id=none))
    assert len(tokenizer("hi")["input_ids"]) == 2 and tokenizer.bos_token is None
    assert "no BOS token is defined" in caplog.text


def test_no_end_token_is_put_behind_a_prompt(tmp_path, caplog):
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", add_eos_token=True))
    assert 257 not in tokenizer("hi")["input_ids"] and "add_eos_token" in caplog.text


def test_two_tokens_of_one_text(tmp_path, caplog):
    """The first is what text becomes, or the control token of that text; decoding gives the text for both."""
    extra = ["xy", "xy", "<|end|>", "", "<|u|>", "<|u|>"]
    types = [1, 1, 1, 1, 1, 4]
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", extra, types, pre="llama-bpe", add_bos_token=False))
    xy, again, end, nothing, ordinary, defined = range(259, 265)
    assert tokenizer("xy<|end|><|u|>")["input_ids"] == [xy, 257, defined]
    assert tokenizer.decode([again, xy, ordinary, nothing, defined]) == "xyxy<|u|><|u|>"
    assert tokenizer.decode([257, end], skip_special_tokens=True) == ""
    assert "4 tokens have the same text as another, or no text: 'xy'" in caplog.text


def test_an_end_of_turn_is_special_whatever_its_type(tmp_path):
    path = byte_level(tmp_path / "m.gguf", ["<|im_end|>", "<u>"], [1, 4])
    tokenizer = load_tokenizer(path)
    assert tokenizer("a<|im_end|>")["input_ids"][1:] == [259]
    assert tokenizer.decode([259, 260], skip_special_tokens=True) == "<u>"


# ---------------------------------------------------------------- SentencePiece

@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_by_score_and_writes_bytes(tmp_path, prefix):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "m.gguf", add_space_prefix=prefix))
    rng = random.Random(1)
    for text in [
        "",
        " ",
        "  a",
        "a ",
        "\u00e9",
        "\n\n",
        *(random_text(rng, "aabbcde  n\u00e9\n\u4e16", 40) for _ in range(500)),
    ]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == encode(text, SCORES, prefix), text
        assert tokenizer.decode(ids) == text


def test_sentencepiece_without_bytes_has_an_unknown_token(tmp_path):
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "m.gguf", bytes_=False))
    ids = tokenizer("a\u4e16\u754cb", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<unk>", "b"] and ids.count(0) == 1


def test_sentencepiece_puts_bos_and_splits_at_special_tokens(tmp_path):
    """A blank comes before a text and before what follows a special token, as llama.cpp has it."""
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "m.gguf", extra=["<u>", "  "]))
    names = tokenizer.convert_ids_to_tokens(tokenizer("a</s>b<u>c")["input_ids"])
    assert names == ["<s>", *encode("a", SCORES), "</s>", *encode("b", SCORES), "<u>", *encode("c", SCORES)]
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  b", add_special_tokens=False)["input_ids"])[1] == "  "
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_sentencepiece_without_ids_finds_them_by_name(tmp_path):
    tokenizer = load_tokenizer(
        sentencepiece(tmp_path / "m.gguf", bos_token_id=None, eos_token_id=None, unknown_token_id=None)
    )
    assert tokenizer("a")["input_ids"][0] == 1 and tokenizer.eos_token_id == 2


BROKEN = {
    "few scores": ({"scores": [1.0]}, "scores has 1 entries for"),
    "nan": ({"scores": [float("nan")] * (259 + len(PIECES))}, "scores contains nan"),
    "texts": ({"scores": ["a"]}, "scores must be a list of numbers"),
    "charsmap": ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap is not supported"),
    "no bytes, no unknown": (
        {"bytes_": False, "unknown_token_id": None, "token_type": [3, 3, 3] + [1] * len(PIECES)},
        "neither all bytes",
    ),
}


@pytest.mark.parametrize(("changes", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_sentencepiece_is_named(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        load_tokenizer(sentencepiece(tmp_path / "m.gguf", **changes))
