"""GGUF files written with the `gguf` package's own writer: weights, tokenizer, and every kind of broken file."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import CONFIG, Type, write
from golden import models

from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.weights import targets
from ppow_jax.weights.gguf import load_target
from ppow_jax.weights.gguf_tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
KINDS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_tensors_are_the_dequantised_ones_in_hugging_face_layout(tmp_path, kind):
    config, params = load_target(write(tmp_path / "m.gguf", kind=kind))
    assert config == dataclasses.replace(CONFIG, rms_norm_eps=1e-5)
    for (path, expected), value in zip(
        jax.tree_util.tree_leaves_with_path(models.target_params(CONFIG)), jax.tree.leaves(params), strict=True
    ):
        if expected.ndim == 2 and kind != Type.F32:  # blocks lie within a row, so rows may be moved
            rounded = gguf.dequantize(gguf.quantize(expected, kind), kind)
            assert 0 < np.abs(rounded - expected).max() < 0.3
            expected = rounded
        np.testing.assert_array_equal(value, expected, err_msg=jax.tree_util.keystr(path))


def test_dtype_of_the_matrices(tmp_path):
    _, params = load_target(write(tmp_path / "m.gguf"), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", sorted(models.TARGETS))
def test_logits_equal_transformers(tmp_path, name):
    """Untied and tied, and the rotary pairs back in place."""
    golden = np.load(GOLDEN / "llama.npz")
    config, params = load_target(write(tmp_path / "m.gguf", models.TARGETS[name]))
    assert config.tie_word_embeddings == ("lm_head" not in params) == (name == "tied")
    tokens = golden[f"{name}.tokens"]

    @jax.jit
    def logits(params):
        position = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        mask = transformer.causal_mask(*tokens.shape)
        return transformer.logits(params, transformer.forward(params, config, tokens, position, mask).hidden_BxSxD)

    np.testing.assert_allclose(logits(params), golden[f"{name}.logits"], rtol=0, atol=1e-4)


def test_rotary_frequencies_and_defaults_may_be_left_to_the_reader(tmp_path):
    fields = {"llama.rope.freq_base": None, "tokenizer.ggml.eos_token_id": None}
    narrow = dataclasses.replace(CONFIG, head_dim=8)
    path = write(tmp_path / "m.gguf", narrow, fields=fields | {"llama.attention.key_length": None})
    config, _ = load_target(path)
    assert (config.rope_theta, config.head_dim, config.eos_token_ids) == (10000.0, 8, ())


Q, DOWN = "blk.1.attn_q.weight", "blk.0.ffn_down.weight"
BROKEN = {
    "architecture": ({"architecture": "gpt2"}, ["'gpt2'", "llama"]),
    "missing tensor": ({"tensors": {DOWN: None}}, ["missing", "down_proj"]),
    "missing embedding": ({"tensors": {"token_embd.weight": None}}, ["token_embd.weight"]),
    "unknown tensor": ({"tensors": {"blk.0.attn_sinks.weight": np.ones((2, 32))}}, ["blk.0.attn_sinks"]),
    "unknown layer": ({"tensors": {"blk.2.attn_norm.weight": np.ones(32)}}, ["blk.2.attn_norm"]),
    "no layer number": ({"tensors": {"blk.x.attn_norm.weight": np.ones(32)}}, ["blk.x.attn_norm"]),
    "no layer part": ({"tensors": {"blk.0": np.ones(32)}}, ["blk.0"]),
    "bias": ({"tensors": {"blk.0.attn_q.bias": np.ones(64)}}, ["blk.0.attn_q.bias"]),
    "shape": ({"tensors": {DOWN: np.ones((64, 32))}}, ["down_proj", "(64, 32)", "(32, 64)"]),
    "heads": ({"tensors": {Q: np.ones((60, 32))}}, ["q_proj", "60"]),
    "vector for a matrix": ({"tensors": {Q: np.ones(64)}}, ["q_proj", "(64,)"]),
    "embedding is a vector": ({"tensors": {"token_embd.weight": np.ones(64)}}, ["token_embd"]),
    "missing key": ({"fields": {"llama.block_count": None}}, ["llama.block_count"]),
    "zero heads": ({"fields": {"llama.attention.head_count": 0}}, ["num_attention_heads", "0"]),
    "odd heads": ({"fields": {"llama.attention.head_count_kv": 3}}, ["3"]),
    "heads per layer": ({"fields": {"llama.attention.head_count": [4, 4]}}, ["num_attention_heads", "[4, 4]"]),
    "text for a number": ({"fields": {"llama.embedding_length": "wide"}}, ["wide"]),
    "end token": ({"fields": {"tokenizer.ggml.eos_token_id": 20}}, ["eos_token_id", "20"]),
    "end token is text": ({"fields": {"tokenizer.ggml.eos_token_id": "</s>"}}, ["eos_token_id"]),
    "scaled rotation": ({"fields": {"llama.rope.scaling.type": "linear"}}, ["factor = None"]),
    "unknown rotation": ({"fields": {"llama.rope.scaling.type": "su"}}, ["'su'", "linear"]),
    "rotary factors": ({"tensors": {"rope_freqs.weight": np.ones(7)}}, ["head_dim / 2 = 8 numbers"]),
    "rotary factors of 0": ({"tensors": {"rope_freqs.weight": np.zeros(8)}}, ["short_factor = 0.0"]),
    "half the head rotated": ({"fields": {"llama.rope.dimension_count": 8}}, ["dimension_count", "8"]),
    "too many layers": ({"fields": {"llama.block_count": 4_000_000}}, ["4000000"]),
}


@pytest.mark.parametrize("how, words", BROKEN.values(), ids=BROKEN)
def test_broken_models_are_named(tmp_path, how, words):
    path = write(tmp_path / "m.gguf", **how)
    with pytest.raises(UserError) as error:
        load_target(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_all_problems_come_in_one_message(tmp_path):
    tensors = {DOWN: None, Q: np.ones((32, 32)), "blk.0.x.weight": np.ones(32)}
    with pytest.raises(UserError, match=r"(?s)(?=.*down_proj)(?=.*\(32, 32\))(?=.*blk\.0\.x)"):
        load_target(write(tmp_path / "m.gguf", tensors=tensors))


def test_files_that_are_no_gguf(tmp_path):
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "text.gguf").write_text("hello " * 100)
    (tmp_path / "zeros.gguf").write_bytes(b"GGUF" + bytes(60))
    for name in ("empty.gguf", "text.gguf", "zeros.gguf", "absent.gguf", "."):
        with pytest.raises(UserError, match="not a readable GGUF file"):
            load_target(tmp_path / name)


def test_a_file_cut_short_anywhere(tmp_path):
    whole = write(tmp_path / "m.gguf").read_bytes()
    data = gguf.GGUFReader(tmp_path / "m.gguf").data_offset
    for size in [*range(4, data, 61), *range(data, len(whole) - 32, (len(whole) - data) // 9)]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(UserError, match="cut.gguf"):
            load_target(tmp_path / "cut.gguf")


def test_a_list_that_claims_to_be_endless(tmp_path):
    whole = bytearray(write(tmp_path / "m.gguf", fields={"some.numbers": [1, 2, 3]}).read_bytes())
    length_at = whole.index(b"some.numbers") + len("some.numbers") + 8  # behind the types of list and element
    assert whole[length_at : length_at + 8] == (3).to_bytes(8, "little")
    whole[length_at : length_at + 8] = (1 << 40).to_bytes(8, "little")
    (tmp_path / "long.gguf").write_bytes(whole)
    with pytest.raises(UserError, match="long.gguf"):
        load_target(tmp_path / "long.gguf")


def test_damaged_headers_never_give_another_error(tmp_path):
    """Bytes of names, types, lengths and offsets overwritten at random: the file loads, or a UserError says why."""
    whole = np.frombuffer(write(tmp_path / "m.gguf").read_bytes(), np.uint8)
    data, rng = gguf.GGUFReader(tmp_path / "m.gguf").data_offset, np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = whole.copy()
        damaged[rng.integers(4, data, 2)] = rng.choice([0, 1, 2, 8, 9, 65, 127, 255], 2)
        (tmp_path / "damaged.gguf").write_bytes(damaged.tobytes())
        try:
            load_target(tmp_path / "damaged.gguf")
        except UserError:
            refused += 1
    assert refused > 75


# ---------------------------------------------------------------- tokenizer

BYTES = [chr(b) if 33 <= b < 127 else "Ġ" for b in range(32, 127)]  # blank and printable ASCII, as byte-level BPE
TOKENS = ["<|end|>", *BYTES, "he", "ll", "Ġ1", "<u>"]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, *[1] * (len(TOKENS) - 2), 4],
    "tokenizer.ggml.merges": ["h e", "l l", "Ġ 1"],
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.bos_token_id": None,
    "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}",
}


def write_tokenizer(path: Path, **changes) -> Path:
    return write(path, fields=TOKENIZER | {f"tokenizer.ggml.{key}": value for key, value in changes.items()})


def test_tokenizer_merges_splits_and_keeps_special_tokens(tmp_path):
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "m.gguf"))
    text = "hello 11<|end|><u>he"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "ll", "o", "Ġ", "1", "1", "<|end|>", "<u>", "he"]
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids, skip_special_tokens=True) == "hello 11<u>he"
    assert tokenizer.eos_token == "<|end|>" and tokenizer.bos_token is None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) == "a b<|end|>"


def test_pre_tokenizers_differ_where_digits_meet_blanks(tmp_path):
    texts = {}
    for pre in ("gpt-2", "smollm"):
        tokenizer = load_tokenizer(write_tokenizer(tmp_path / f"{pre}.gguf", pre=pre))
        texts[pre] = tokenizer.convert_ids_to_tokens(tokenizer("o 1")["input_ids"])
    assert texts == {"gpt-2": ["o", "Ġ1"], "smollm": ["o", "Ġ", "1"]}


BROKEN_TOKENIZERS = {
    "sentencepiece without scores": ({"model": "llama"}, ["'llama'", "scores", "missing"]),
    "unknown kind": ({"model": "t5"}, ["'t5'", "'gpt2'", "'llama'"]),
    "tokens are numbers": ({"tokens": [1, 2]}, ["tokens", "list of texts"]),
    "types are texts": ({"token_type": ["a"]}, ["token_type", "list of numbers"]),
    "one text for the tokens": ({"tokens": "abc"}, ["tokens", "list of texts"]),
    "pre-tokenizer is a number": ({"pre": 3}, ["pre", "3", "a text"]),
    "add_bos_token is a number": ({"add_bos_token": 1}, ["add_bos_token", "true or false"]),
    "pre-tokenizer": ({"pre": "unheard-of"}, ["'unheard-of'"]),
    "no model": ({"model": None}, ["None"]),
    "no tokens": ({"tokens": None}, ["tokens"]),
    "no types": ({"token_type": None}, ["token_type"]),
    "few types": ({"token_type": [3, 1]}, ["token_type"]),
    "no merges": ({"merges": None}, ["merges"]),
    "merge of one part": ({"merges": ["he"]}, ["merge"]),
    "merge of unknown parts": ({"merges": ["xx yy"]}, ["xx"]),
    "end token out of range": ({"eos_token_id": 999}, ["eos_token_id", "999"]),
}


@pytest.mark.parametrize("changes, words", BROKEN_TOKENIZERS.values(), ids=BROKEN_TOKENIZERS)
def test_broken_tokenizers_are_named(tmp_path, changes, words):
    path = write_tokenizer(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert all(word in str(error.value) for word in [str(path), *words]), error.value


def test_tokenizer_of_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "text.gguf").write_text("hello " * 100)
    with pytest.raises(UserError, match="text.gguf"):
        load_tokenizer(tmp_path / "text.gguf")


# ---------------------------------------------------------------- SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    return targets.load("smollm2-135m", "float32")


@pytest.mark.smollm2
def test_smollm2_is_read_as_transformers_reads_it(smollm2):
    golden, tokenizer = json.loads((GOLDEN / "smollm2.json").read_text()), smollm2.tokenizer
    for entry in golden["texts"]:
        assert tokenizer(entry["text"])["input_ids"] == entry["ids"], entry["text"]
        assert tokenizer.decode(entry["ids"]) == entry["text"]
    for entry in golden["chats"]:
        assert tokenizer.apply_chat_template(entry["messages"], return_dict=False) == entry["ids"]
    config = smollm2.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.rope_theta, config.tie_word_embeddings) == (49152, 100000.0, True)
    assert config.eos_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
