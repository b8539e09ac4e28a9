"""GGUF files by their first bytes, in parts, and with tensors or metadata out of place."""

import dataclasses
import shutil
import struct
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf_files import TOKENIZER, WHOLE, write
from golden import models

from ppow_jax.errors import UserError
from ppow_jax.weights import targets
from ppow_jax.weights.gguf import load_target
from ppow_jax.weights.gguf_file import is_gguf, open_model


def write_whole(path: Path, **changes) -> Path:
    """A model that loads with its tokenizer."""
    return write(path, WHOLE, **{"fields": TOKENIZER} | changes)


# ---------------------------------------------------------------- the first bytes decide


@pytest.mark.parametrize("name", ["blob", "m.GGUF", "sha256-0123", "m.bin", "m.safetensors"])
def test_a_gguf_file_by_any_name(tmp_path, name):
    shutil.copy(write_whole(tmp_path / "m.gguf"), tmp_path / name)
    target = targets.load(str(tmp_path / name), "float32")
    assert target.config.eos_token_ids == (257,) and target.tokenizer("he")["input_ids"] == [258]
    assert is_gguf(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"tjgg" + bytes(90), "GGML, the form before GGUF"),
        (b"", "the file is empty"),
        (b"\x00\x01\x02\x03" + bytes(90), "must be GGUF"),
        (b"GGUF", "it is truncated"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "its byte order differs"),
    ],
)
@pytest.mark.parametrize("name", ["m.gguf", "blob"])
def test_another_file_is_told_from_gguf(tmp_path, content, said, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not a readable GGUF file \(.*{said}"):
        targets.load(str(tmp_path / name), "float32")
    assert is_gguf(tmp_path / name) == content.startswith(b"GGUF")


def test_a_directory_of_gguf_files_names_one(tmp_path):
    write_whole(tmp_path / "m-q8.gguf")
    with pytest.raises(UserError, match=r"contains no config.json, but GGUF files: name one of them, .*m-q8.gguf"):
        targets.load(str(tmp_path), "float32")


@pytest.mark.parametrize("kind", ["adapter", "mmproj", "imatrix", 3])
def test_what_is_no_model(tmp_path, kind):
    path = write_whole(tmp_path / "m.gguf", fields=TOKENIZER | {"general.type": kind})
    with pytest.raises(UserError, match="contains no model: general.type"):
        load_target(path)


def test_more_tokens_than_the_embedding_has_rows(tmp_path):
    path = write(tmp_path / "m.gguf", dataclasses.replace(WHOLE, vocab_size=258), fields=TOKENIZER)
    with pytest.raises(UserError, match="lists 259 tokens, but its embedding has 258 rows"):
        targets.load(str(path), "float32")


# ---------------------------------------------------------------- parts


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    """A model in five parts of five tensors at most."""
    write_whole(tmp_path / "m.gguf", split=5)
    found = sorted(tmp_path.iterdir())
    assert [path.name for path in found] == [f"m-{n:05}-of-00005.gguf" for n in range(1, 6)]
    return found


@pytest.mark.parametrize("given", [0, 3])
def test_all_parts_are_read_whichever_is_named(tmp_path, parts, given):
    config, params = load_target(parts[given])
    jax.tree.map(np.testing.assert_array_equal, params, models.target_params(WHOLE))
    target = targets.load(str(parts[given]), "float32")
    assert target.config == config and target.tokenizer("he")["input_ids"] == [258]


def test_missing_parts_are_named(tmp_path, parts):
    parts[1].unlink()
    parts[4].unlink()
    with pytest.raises(
        UserError, match=r"parts of the model are missing: m-00002-of-00005.gguf, m-00005-of-00005.gguf$"
    ):
        load_target(parts[0])


def test_parts_with_other_names(tmp_path, parts):
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"model.gguf: is one of 5 parts.*must end in -00001-of-00005.gguf"):
        load_target(renamed)


def test_parts_in_another_order(tmp_path, parts):
    shutil.copy(parts[1], parts[2])
    with pytest.raises(UserError, match=r"m-00003-of-00005.gguf: split.no, split.count = 1, 5 must be 2, 5"):
        load_target(parts[0])


def test_a_part_of_another_model(tmp_path, parts):
    other = tmp_path / "other"
    other.mkdir()
    write_whole(other / "m.gguf", split=5, tensors={"token_embd.weight": None, "x": np.ones((4, 4))})
    shutil.copy(other / parts[1].name, parts[1])
    with pytest.raises(UserError, match=r"duplicate tensor.*is missing"):
        load_target(parts[0])


def test_a_damaged_part_is_named(tmp_path, parts):
    parts[2].write_bytes(parts[2].read_bytes()[:-64])
    with pytest.raises(UserError, match=r"m-00003-of-00005.gguf: not a readable GGUF file \(it is truncated"):
        load_target(parts[0])


@pytest.mark.parametrize("fields", [{"split.count": 1, "split.no": 0}, {"split.count": 0}])
def test_one_part_is_a_whole_model(tmp_path, fields):
    config, params = load_target(write_whole(tmp_path / "m.gguf", fields=TOKENIZER | fields))
    assert config == dataclasses.replace(WHOLE, eos_token_ids=(257,))
    assert params["embed"].shape == (WHOLE.vocab_size, WHOLE.hidden_size)


@pytest.mark.parametrize("count", ["two", 2**31, [2]])
def test_a_count_of_parts_that_is_none(tmp_path, count):
    path = write_whole(tmp_path / "m.gguf", fields=TOKENIZER | {"split.count": count})
    with pytest.raises(UserError, match=r"split.count = .* must be a whole number"):
        load_target(path)


# ---------------------------------------------------------------- tensors and metadata


def test_tensors_that_swapped_places(tmp_path):
    """Two matrices of one shape whose offsets are exchanged would load as each other."""
    path = write_whole(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(path)
    up, gate = (next(t for t in reader.tensors if t.name == f"blk.0.ffn_{x}.weight") for x in ("up", "gate"))
    data = bytearray(path.read_bytes())
    places = [t.field.offset + 8 + len(t.name) + 4 + 16 + 4 for t in (up, gate)]
    a, b = (data[place : place + 8] for place in places)
    data[places[0] : places[0] + 8], data[places[1] : places[1] + 8] = b, a
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"tensor blk.0.ffn_\w+.weight is stored at byte \d+, must be at \d+"):
        load_target(path)


def test_text_that_is_not_utf8(tmp_path):
    path = write_whole(tmp_path / "m.gguf", fields=TOKENIZER | {"tokenizer.chat_template": "Zqxw"})
    path.write_bytes(path.read_bytes().replace(b"Zqxw", b"\xff\xfe\xfd\xfc"))
    with pytest.raises(UserError, match="'tokenizer.chat_template' cannot be read"):
        targets.load(str(path), "float32")


def test_old_key_of_linear_scaling(tmp_path):
    """It was written before `rope.scaling.type` was."""
    fields = TOKENIZER | {"llama.rope.scale_linear": 4.0}
    assert load_target(write_whole(tmp_path / "m.gguf", fields=fields))[0].rope_scaling.factor == 4.0
    fields |= {"llama.rope.scale_linear": 1.0}
    assert load_target(write_whole(tmp_path / "m.gguf", fields=fields))[0].rope_scaling is None


def test_metadata_by_type(tmp_path):
    file = open_model(write_whole(tmp_path / "m.gguf", fields=TOKENIZER | {"a.list": [1, 2], "a.flag": True}))
    assert file.array("a.list", int) == [1, 2] and file.flag("a.flag", False) and file.text("a.text", "x") == "x"
    assert "a.list" in file and "b" not in file and file.array("b", int) is None
    for read in (lambda: file.array("a.list", str), lambda: file.array("a.flag", int), lambda: file.text("a.list")):
        with pytest.raises(UserError, match=r"a\.\w+.* must be a"):
            read()
    with pytest.raises(UserError, match="metadata key 'b' is missing"):
        file.get("b")
