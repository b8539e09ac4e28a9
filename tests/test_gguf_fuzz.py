"""Damaged headers of GGUF files: one UserError, or what the file really says; never anything else.

Nothing may hang, and no lying length may be allocated before it is checked.
"""

import dataclasses
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf_files import BYTES, CONFIG, PIECES, SCORES, interleaved, named
from gguf_mutations import ARRAY, BOOL, F32, I32, STRING, U32, Field, File, Stored, mutate
from golden import models

from ppow_jax.data.encoding import CHATML_TEMPLATE
from ppow_jax.errors import UserError
from ppow_jax.models import transformer
from ppow_jax.weights import targets

SMALL = 24 << 20  # bytes; the files have half of one million
SECONDS = 30  # for a file that takes a tenth of one
SEEDS = 350
FEW = 12
NAMED = {  # of each kind
    "gpt2": (*BYTES, "<|im_start|>", "<|im_end|>", "he", "<u>"),
    "llama": ("<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], *PIECES),
}
TYPES = {"gpt2": [1] * 256 + [3, 3, 1, 4], "llama": [2, 3, 3] + [6] * 256 + [1] * len(PIECES)}
_made: dict[str, list[Stored]] = {}


def config_of(kind: str):
    return dataclasses.replace(CONFIG, num_layers=1, vocab_size=len(NAMED[kind]))


def tensors_of(kind: str) -> list[Stored]:
    if kind not in _made:
        values = named(models.target_params(config_of(kind)))
        for name in values:
            if ".attn_q." in name or ".attn_k." in name:
                values[name] = interleaved(values[name], len(values[name]) // CONFIG.head_dim)
        _made[kind] = [Stored(name, np.asarray(value, np.float32)) for name, value in values.items()]
    return [dataclasses.replace(tensor) for tensor in _made[kind]]


def file_of(kind: str) -> File:
    """A sound model with the tokenizer of this kind."""
    numbers = {
        "block_count": 1,
        "context_length": 128,
        "embedding_length": CONFIG.hidden_size,
        "feed_forward_length": CONFIG.intermediate_size,
        "attention.head_count": CONFIG.num_heads,
        "attention.head_count_kv": CONFIG.num_kv_heads,
        "attention.key_length": CONFIG.head_dim,
        "rope.dimension_count": CONFIG.head_dim,
    }
    ids = {"bos": 256, "eos": 257, "padding": 257} if kind == "gpt2" else {"bos": 1, "eos": 2, "unknown": 0}
    key = "tokenizer.ggml."
    fields = [
        Field("general.architecture", STRING, "llama"),
        Field("general.name", STRING, "Zqxw"),
        *(Field(f"llama.{name}", U32, number) for name, number in numbers.items()),
        Field("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
        Field("llama.rope.freq_base", F32, 10000.0),
        Field(f"{key}model", STRING, kind),
        Field(f"{key}pre", STRING, "llama-bpe" if kind == "gpt2" else "default"),
        Field(f"{key}tokens", ARRAY, list(NAMED[kind]), STRING),
        Field(f"{key}token_type", ARRAY, TYPES[kind], I32),
        Field(f"{key}add_bos_token", BOOL, True),
        *(Field(f"{key}{use}_token_id", U32, i) for use, i in ids.items()),
        Field("tokenizer.chat_template", STRING, CHATML_TEMPLATE),
    ]
    if kind == "gpt2":
        fields.append(Field(f"{key}merges", ARRAY, ["h e"], STRING))
    else:
        fields.append(Field(f"{key}scores", ARRAY, [0.0] * 259 + list(SCORES.values()), F32))
    return File(fields, tensors_of(kind))


@pytest.fixture(autouse=True)
def watched() -> Iterator[None]:
    """Memory, and time: a hang ends the test."""

    def late(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    tracemalloc.start()
    yield
    tracemalloc.stop()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def load(path: Path) -> targets.Target | None:
    """The model that is read from a file; None for a UserError in one line that names it."""
    signal.alarm(SECONDS)
    tracemalloc.reset_peak()
    start = tracemalloc.get_traced_memory()[0]
    try:
        return targets.load(str(path), "float32")
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 9000, str(error)
        return None
    finally:
        signal.alarm(0)
        assert tracemalloc.get_traced_memory()[1] - start < SMALL


def check(path: Path, target: targets.Target) -> None:
    """Parameters and tokens are those that the file says, by the package's own reader."""
    reader = gguf.GGUFReader(path)
    said = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    shapes = jax.tree.map(lambda x: x.shape, jax.eval_shape(lambda: transformer.init(jax.random.key(0), target.config)))
    assert jax.tree.map(np.shape, target.params) == shapes
    found = named(jax.tree.map(np.asarray, target.params))
    for name, value in found.items():
        if ".attn_q." in name or ".attn_k." in name:
            value = interleaved(value, len(value) // target.config.head_dim)
        if said[name].dtype == np.float32:
            np.testing.assert_array_equal(value, said[name])
    tokens, ends = reader.get_field("tokenizer.ggml.tokens").contents(), target.config.eos_token_ids
    for i, token in enumerate(tokens):
        name = target.tokenizer.convert_ids_to_tokens(i)
        assert name == token or token in tokens[:i] + tokens[i + 1 :] + [""] and name.startswith(token)
    eos = reader.get_field("tokenizer.ggml.eos_token_id")
    assert eos is None or eos.contents() in (*ends, 2**32 - 1, -1)
    text = "he ab \u00e9 12345 <u>"
    ids = target.tokenizer(text)["input_ids"]
    assert all(0 <= i < target.config.vocab_size for i in ids) and len(ids) <= 3 * len(text)


def run(kind: str, seeds: range, tmp_path: Path) -> int:
    """The number of files that were refused."""
    refused = 0
    for seed in seeds:
        said, data = mutate(lambda: file_of(kind), seed)
        path = tmp_path / "m.gguf"
        path.write_bytes(data)
        try:
            target = load(path)
            if target is not None:
                check(path, target)
        except Exception as error:
            raise AssertionError(said) from error
        refused += target is None
    return refused


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_sound_files_are_read(tmp_path, kind):
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of(kind).encode())
    target = load(path)
    check(path, target)
    jax.tree.map(np.testing.assert_array_equal, target.params, models.target_params(config_of(kind)))
    assert target.tokenizer.decode(target.tokenizer("he ab")["input_ids"], skip_special_tokens=True) == "he ab"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_few_damaged_headers(tmp_path, kind):
    assert FEW // 3 < run(kind, range(FEW), tmp_path) < FEW


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_many_damaged_headers(tmp_path, kind):
    assert SEEDS // 4 < run(kind, range(FEW, FEW + SEEDS // 2), tmp_path) < SEEDS // 2


LIES = {
    "an endless text": (lambda f: setattr(f.field("general.name"), "length", 2**62), "truncated"),
    "a long list": (lambda f: setattr(f.field("tokenizer.ggml.tokens"), "length", 2**20), "truncated"),
    "a long list of numbers": (lambda f: setattr(f.field("tokenizer.ggml.token_type"), "length", 2**20), "truncated"),
    "an endless list": (lambda f: setattr(f.field("tokenizer.ggml.tokens"), "length", 2**62), "entries, more than"),
    "endless metadata": (lambda f: setattr(f, "num_fields", 2**62), "metadata entries, more than"),
    "endless tensors": (lambda f: setattr(f, "num_tensors", 2**62), "tensors, more than"),
    "a key twice": (lambda f: f.fields.append(Field("general.name", STRING, "x")), "Duplicate general.name"),
    "a tensor twice": (lambda f: f.tensors.append(dataclasses.replace(f.tensors[0])), "duplicated tensor"),
    "a product that wraps": (lambda f: setattr(f.tensors[0], "shape", (2**32, 2**32)), "not a readable"),
    "alignment of 3": (lambda f: f.fields.append(Field("general.alignment", U32, 3)), "alignment"),
    "no text": (lambda f: setattr(f.field("tokenizer.chat_template"), "value", b"\xff"), "cannot be read"),
    "architecture is a number": (
        lambda f: f.fields.__setitem__(0, Field("general.architecture", U32, 1)),
        "architecture 1 is not supported",
    ),
}


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("lie", "said"), LIES.values(), ids=LIES)
def test_lies_are_named(tmp_path, kind, lie, said):
    file = file_of(kind)
    lie(file)
    path = tmp_path / "m.gguf"
    path.write_bytes(file.encode())
    with pytest.raises(UserError, match=said):
        targets.load(str(path), "float32")


def test_a_token_of_a_million_letters(tmp_path):
    """A vocabulary's longest token costs no square of its length."""
    file = file_of("llama")
    file.field("tokenizer.ggml.tokens").value[-1] = "a" * 1_000_000
    path = tmp_path / "m.gguf"
    path.write_bytes(file.encode())
    assert load(path) is not None
