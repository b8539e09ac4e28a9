"""Tokenizers in directories: read, or refused in one line that names the file."""

import json
from pathlib import Path

import pytest
from damaged_files import PAGE, POINTER

from ppow_jax.data.encoding import tiny_tokenizer
from ppow_jax.errors import UserError
from ppow_jax.weights.tokenizer_files import load_tokenizer

TEXT = "Where are the 12 ducks?\n"


@pytest.fixture
def directory(tmp_path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return tmp_path


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_model(directory: Path, **vocabulary) -> None:
    value = json.loads((directory / "tokenizer.json").read_text())
    value["model"]["vocab"] |= vocabulary
    (directory / "tokenizer.json").write_text(json.dumps(value))


def refused(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_tokenizer(directory, 259)
    said = str(caught.value)
    assert str(directory) in said and "\n" not in said and len(said) < 700
    return said


def test_a_sound_one(directory, caplog):
    tokenizer = load_tokenizer(directory, 259)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer()(TEXT)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer().chat_template and not caplog.text


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
BROKEN = {
    "nothing": ("", "is empty"),
    "pointer": (POINTER, "Git LFS pointer"),
    "page": (PAGE, "web page"),
    "half": ('{"a": [1,', "not valid JSON"),
    "list": ("[1]", "must contain a JSON object"),
    "noise": ("\x00\x01", "not valid JSON"),
    "deep": ("[" * 100_000, "cannot be read"),
    "digits": ("1" * 5000, "cannot be read"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("text", "said"), BROKEN.values(), ids=BROKEN)
def test_broken_json(directory, name, text, said):
    (directory / name).write_text(text)
    found = refused(directory)
    assert name in found and said in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer_class": 7}, "its tokenizer cannot be read (AttributeError"),
        ({"eos_token": 7}, "eos_token"),
        ({"eos_token": ["a"]}, "eos_token"),
        ({"model_max_length": "x"}, "its tokenizer cannot be read"),
        ({"added_tokens_decoder": {"x": 7}}, "added_tokens_decoder"),
        ({"extra_special_tokens": 7}, "extra_special_tokens"),
        ({"tokenizer_class": "Custom", "auto_map": {"AutoTokenizer": ["a.b", "a.c"]}}, "contains custom code"),
    ],
)
def test_broken_settings(directory, changes, said, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    edit(directory / "tokenizer_config.json", **changes)
    assert said in refused(directory)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": None}, "model = None must be an object"),
        ({"model": {"type": "X", "vocab": {}}}, "its tokenizer cannot be read"),
        ({"added_tokens": 7}, "its tokenizer cannot be read"),
        ({"pre_tokenizer": {"type": "X"}}, "its tokenizer cannot be read"),
    ],
)
def test_broken_tokenizers(directory, changes, said):
    edit(directory / "tokenizer.json", **changes)
    assert said in refused(directory)


def test_broken_vocabularies(directory):
    edit_model(directory, a=-1)
    assert "its tokenizer cannot be read" in refused(directory)
    edit_model(directory, a=tiny_tokenizer().convert_tokens_to_ids("b"))
    assert "tokenizer.json: the tokens 'a' and 'b' have the same id" in refused(directory)


def test_no_tokenizer_at_all(directory):
    (directory / "tokenizer.json").unlink()
    assert "has no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json" in refused(directory)


@pytest.mark.parametrize("name", ["tokenizer.model", "merges.txt", "chat_template.jinja"])
def test_other_files_that_are_pointers(directory, name):
    (directory / name).write_text(POINTER)
    found = refused(directory)
    assert name in found and "Git LFS pointer" in found


def test_a_template_that_is_no_text(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "its tokenizer cannot be read (UnicodeDecodeError" in refused(directory)


def test_tokens_beyond_the_embedding_are_warned_of(directory, caplog):
    edit(directory / "tokenizer_config.json", eos_token="<|new|>")
    assert len(load_tokenizer(directory, 259)) == 260
    assert "260 tokens, the embedding 259 rows: texts with other tokens, such as '<|new|>'" in caplog.text
