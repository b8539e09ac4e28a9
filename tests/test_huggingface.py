"""Targets in Hugging Face directories: whole, sharded, tied, and in every way broken."""

import json
import random
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_configs
from damaged_files import mutate
from safetensors.numpy import load_file, save_file

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.weights.huggingface import CONFIG, INDEX, WEIGHTS, load_target, save_target

V, D, I, N = 12, 8, 6, 2  # noqa: E741
HEAD = "lm_head.weight"


def tiny_config(tied: bool) -> ModelConfig:
    return small_configs.target_config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=I,
        num_layers=N,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        eos_token_ids=(1,),
    )


def tiny_params(tied: bool, dtype=np.float32) -> dict:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    layer = {
        "input_norm": (D,),
        "q_proj": (8, D),
        "k_proj": (4, D),
        "v_proj": (4, D),
        "o_proj": (D, 8),
        "post_norm": (D,),
        "gate_proj": (I, D),
        "up_proj": (I, D),
        "down_proj": (D, I),
    }
    params = {"embed": normal(V, D), "norm": normal(D)}
    params |= {} if tied else {"lm_head": normal(V, D)}
    return params | {"layers": [{name: normal(*shape) for name, shape in layer.items()} for _ in range(N)]}


def save(directory: Path, tied: bool = False, dtype=np.float32) -> dict:
    params = tiny_params(tied, dtype)
    save_target(directory, tiny_config(tied), params)
    return params


def shard(directory: Path, parts: int = 3) -> None:
    """Splits a single file as transformers does."""
    tensors = load_file(directory / WEIGHTS)
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    weight_map = {tensor: names[i % parts] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t in tensors if weight_map[t] == name}, directory / name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / WEIGHTS).unlink()


def edit_tensors(directory: Path, **changes) -> None:
    """Replaces tensors (`__` for the dot); None takes one away."""
    tensors = load_file(directory / WEIGHTS)
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, directory / WEIGHTS)


def edit_config(directory: Path, **changes) -> None:
    path = directory / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(params: dict, expected: dict, dtype=np.float32) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == dtype
        np.testing.assert_array_equal(np.asarray(ours), theirs.astype(dtype))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip(tmp_path, tied, stored, dtype):
    expected = save(tmp_path, tied, stored)
    config, params = load_target(tmp_path, dtype)
    assert config == tiny_config(tied)
    assert_same(params, expected, dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([CONFIG, WEIGHTS, INDEX])


def test_sharded(tmp_path):
    expected = save(tmp_path)
    shard(tmp_path)
    assert_same(load_target(str(tmp_path))[1], expected)


def test_tied_head_may_be_stored_if_equal(tmp_path):
    expected = save(tmp_path, tied=True)
    edit_tensors(tmp_path, lm_head__weight=expected["embed"])
    assert_same(load_target(tmp_path)[1], expected)
    edit_tensors(tmp_path, lm_head__weight=expected["embed"] + 1)
    with pytest.raises(UserError, match=r"lm_head.weight: differs from model.embed_tokens.weight"):
        load_target(tmp_path)


def test_buffers_are_ignored(tmp_path):
    expected = save(tmp_path)
    edit_tensors(tmp_path, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(2, np.float32))
    assert_same(load_target(tmp_path)[1], expected)


def test_all_problems_in_one_message(tmp_path):
    save(tmp_path)
    edit_tensors(
        tmp_path,
        lm_head__weight=None,
        model__norm__weight=np.ones(D + 1, np.float32),
        model__layers__0__self_attn__q_proj__bias=np.ones(8, np.float32),
        model__layers__1__mlp__up_proj__weight=np.ones((I, D), np.int8),
    )
    with pytest.raises(UserError) as caught:
        load_target(tmp_path)
    for said in (
        "lm_head.weight: missing",
        "model.norm.weight: has shape [9], the config requires [8]",
        "model.layers.0.self_attn.q_proj.bias: unknown",
        "model.layers.1.mlp.up_proj.weight: has type I8",
    ):
        assert said in str(caught.value)


def test_many_problems_are_cut_short(tmp_path):
    save(tmp_path)
    edit_config(tmp_path, num_hidden_layers=4096)
    with pytest.raises(UserError, match=r"and \d+ more") as caught:
        load_target(tmp_path)
    assert len(str(caught.value)) < 5000


def test_lies_among_shards(tmp_path):
    save(tmp_path)
    head = load_file(tmp_path / WEIGHTS)[HEAD]
    shard(tmp_path)
    index = json.loads((tmp_path / INDEX).read_text())
    first, last = min(index["weight_map"].values()), max(index["weight_map"].values())
    save_file(load_file(tmp_path / last) | {HEAD: head}, tmp_path / last)
    with pytest.raises(UserError, match="lm_head.weight: (duplicated|is in)"):
        load_target(tmp_path)
    (tmp_path / first).unlink()
    with pytest.raises(UserError, match=f"{first}: not a readable safetensors file"):
        load_target(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../x.st"}, {"a": "\0"}, {"a": ""}])
def test_bad_index(tmp_path, weight_map):
    save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="weight_map must map"):
        load_target(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{\n"a": 1,\n}', r"config.json:3: not valid JSON"),
        (b"[1]", "must contain a JSON object, not list"),
        (b"\xff\xfe\x00", "config.json: cannot be read"),
        (b"[" * 100_000, "config.json"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "config.json: cannot be read"),
        (None, "config.json: cannot be read"),
    ],
)
def test_bad_json(tmp_path, content, said):
    save(tmp_path)
    (tmp_path / CONFIG).unlink()
    if content is not None:
        (tmp_path / CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=said):
        load_target(tmp_path)


def test_no_weights(tmp_path):
    save(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match="contains neither model.safetensors nor"):
        load_target(tmp_path)
    (tmp_path / WEIGHTS).mkdir()
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_target(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/place", "./nowhere", "nowhere", "a/b/c", ""])
def test_no_such_place(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(UserError):
        load_target(name)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "x.gguf").touch()
    with pytest.raises(UserError, match="is a file"):
        load_target(tmp_path / "x.gguf")


def test_hub(tmp_path, monkeypatch):
    expected = save(tmp_path)

    def snapshot_download(name, allow_patterns):
        if name != "owner/model":
            raise ConnectionError("no network\nlong story")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert_same(load_target("owner/model")[1], expected)
    with pytest.raises(UserError, match=r"^owner/other: .*\(no network\)$"):
        load_target("owner/other")


def test_replacing_leaves_no_half_model(tmp_path, monkeypatch):
    save(tmp_path)

    def replace(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises(UserError, match="cannot be written.*No space left"):
        save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([WEIGHTS, INDEX])
    with pytest.raises(UserError, match=CONFIG):
        load_target(tmp_path)


def test_unwritable_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "file")


@pytest.mark.parametrize("sharded", [False, True])
def test_fuzz(tmp_path, sharded):
    """Whatever happens to the files: a UserError, or a load of the promised shapes."""
    original = tmp_path / "original"
    expected = save(original)
    if sharded:
        shard(original)
    refused = 0
    for seed in range(100):
        rng = random.Random(seed)
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(original, broken)
        mutate(rng.choice(sorted(broken.iterdir())), rng)
        try:
            config, params = load_target(broken)
        except UserError:
            refused += 1
        else:
            assert config.vocab_size == V
            assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
    assert 30 < refused < 100
