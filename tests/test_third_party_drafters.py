"""Drafters as other people's files have them: what is read rightly all the same, and what is refused by name."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from damaged_files import PAGE, POINTER
from eagle3_files import IDS, PLAIN, E, V, W, edit_config, edit_tensors, params_of
from safetensors.numpy import load_file, save_file

from ppow_jax.errors import UserError
from ppow_jax.models.drafter_config import parameter_shapes
from ppow_jax.weights import huggingface, torch_file
from ppow_jax.weights.drafters import StoredDrafter, export_drafter, import_drafter

FORMATS = ("flat", "speculators")
LAYER = "transformer_layer_config"


def write(path: Path, format: str = "flat", config=PLAIN, ids=IDS, **how) -> Path:
    export_drafter(path, config, params_of(config), ids, dtype="float32", format=format, **how)
    return path


@pytest.fixture(params=FORMATS)
def drafter(request, tmp_path) -> Path:
    """A plain drafter in either format."""
    return write(tmp_path / "drafter", request.param)


@pytest.fixture
def flat(tmp_path) -> Path:
    return write(tmp_path / "flat")


def edit_layer(directory: Path, **changes) -> None:
    """Edits the config of the layer, which is the whole config in the flat format; None drops a key."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    layer = config.get(LAYER, config)
    layer |= changes
    for key in [key for key, value in changes.items() if value is None]:
        del layer[key]
    path.write_text(json.dumps(config))


def same(stored: StoredDrafter, config=PLAIN) -> bool:
    """Whether it is the drafter that `write` wrote."""
    params = params_of(config)
    equal = all(np.array_equal(stored.params[name], value) for name, value in params.items())
    return stored.config == config and equal and stored.target_ids_W.tolist() == IDS.tolist()


# Layers.


@pytest.mark.parametrize("named", [7, 40, None])
def test_the_tensors_say_how_many_layers_there_are(drafter, named, caplog):
    edit_layer(drafter, num_hidden_layers=named)
    assert same(import_drafter(drafter))
    said = f"num_hidden_layers = {named}, but there are weights of 1: taken as 1"
    assert (said in caplog.text) == (named is not None)


def test_the_targets_depth_is_no_drafters(tmp_path, caplog):
    directory = write(tmp_path, "speculators", dataclasses.replace(PLAIN, feature_layers=(0, 1, 2)))
    edit_layer(directory, num_hidden_layers=2)
    assert import_drafter(directory, num_target_layers=2).config.num_layers == 1
    assert "num_hidden_layers = 2, but there are weights of 1" in caplog.text
    with pytest.raises(UserError, match="layers.1.self_attn.q_proj.weight: missing"):
        import_drafter(directory)  # two layers would be a drafter's own, of which one is lost


def test_more_layers_than_the_flat_format_has(tmp_path):
    """Two layers in a flat file, as vLLM reads them."""
    config = dataclasses.replace(PLAIN, num_layers=2)
    directory = write(tmp_path / "d", "speculators", config)
    layer = json.loads((directory / "config.json").read_text())[LAYER]
    flat = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": W}
    (directory / "config.json").write_text(json.dumps(layer | flat | {"num_hidden_layers": 32}))
    stored = import_drafter(directory)
    assert stored.format == "flat" and stored.config == dataclasses.replace(config, feature_layers=())


def test_norms_of_queries_and_keys_in_the_flat_format(tmp_path):
    config = dataclasses.replace(PLAIN, qk_norm=True)
    directory = write(tmp_path / "d", "speculators", config)
    layer = json.loads((directory / "config.json").read_text())[LAYER]
    flat = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": W, "model_type": "llama"}
    (directory / "config.json").write_text(json.dumps(layer | flat | {"eagle_config": {}}))
    stored = import_drafter(directory, num_target_layers=30)
    assert same(stored, config) and stored.format == "flat"
    edit_tensors(directory, drop=("layers.0.self_attn.k_norm.weight",))
    with pytest.raises(UserError, match="k_norm.weight: missing"):
        import_drafter(directory)


# Attention to a window.


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 8},
        {"use_sliding_window": True},
        {"sliding_window": 8},
        {"layer_types": ["sliding_attention"], "sliding_window": 8},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": "sliding_attention"},
        {"layer_types": [{}]},
        {"layer_types": ["chunked_attention"]},
        {"attention_chunk_size": 8192},
    ],
)
def test_sliding_windows_are_refused(drafter, changes):
    edit_layer(drafter, **changes)
    with pytest.raises(UserError, match="config.json.*: sliding windows are not supported in drafters"):
        import_drafter(drafter)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 28},
        {"use_sliding_window": True, "sliding_window": 4096},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention"] * 36},
        {"layer_types": []},
    ],
)
def test_windows_that_are_none_are_read(drafter, changes):
    edit_layer(drafter, **changes)
    assert same(import_drafter(drafter))


# fc: its bias, its features.


@pytest.mark.parametrize("changes", [{"bias": True}, {"bias": False}, {}])
def test_a_bias_in_fc_is_refused_by_name(drafter, changes):
    edit_config(drafter, **changes)
    edit_tensors(drafter, fc__bias=np.ones(E, np.float32), lm_head__bias=np.ones(W, np.float32))
    with pytest.raises(UserError) as caught:
        import_drafter(drafter)
    assert "fc.bias: unknown tensor (a bias in fc is not supported)" in str(caught.value)
    assert "lm_head.bias: unknown tensor (a bias in lm_head is not supported)" in str(caught.value)


def test_biases_of_attention_are_told_by_the_tensors(tmp_path):
    config = dataclasses.replace(PLAIN, attention_bias=True)
    for format in FORMATS:
        directory = write(tmp_path / format, format, config)
        edit_layer(directory, attention_bias=None, qkv_bias=None)
        assert same(import_drafter(directory), config)


@pytest.mark.parametrize(("count", "name"), [(4, "four"), (5, "five"), (6, "six")])
@pytest.mark.parametrize("width", [E, None])
def test_more_features_are_refused_by_name(drafter, count, name, width):
    edit_config(drafter, target_hidden_size=width)
    edit_tensors(drafter, fc__weight=np.ones((E, count * E), np.float32))
    if width is None and count == 6:  # three features of twice the width, as far as anyone can know
        assert import_drafter(drafter).config.target_hidden_size == 2 * E
        return
    with pytest.raises(UserError, match=f"{name} features are not supported, only three"):
        import_drafter(drafter)
    with pytest.raises(UserError, match=f"{name} features are not supported, only three"):
        import_drafter(drafter, target_embed_VxD=np.ones((V, E)))


@pytest.mark.parametrize("key", ["num_aux_hidden_states", "num_eagle_features"])
def test_counts_of_features_in_the_config(flat, key):
    edit_config(flat, **{key: 3})
    assert same(import_drafter(flat))
    edit_config(flat, **{key: 4})
    with pytest.raises(UserError, match=f"{key} = 4 is not supported, only 3"):
        import_drafter(flat)


@pytest.mark.parametrize("format", FORMATS)
def test_the_width_of_features_follows_from_fc(tmp_path, format, caplog):
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(PLAIN, target_hidden_size=12, own_embed=True)
    embed = np.random.default_rng(0).normal(size=(V, E)).astype(np.float32)
    directory = write(tmp_path, format, config, embed_VxE=embed)
    edit_config(directory, ("target_hidden_size",))
    assert same(import_drafter(directory), config)
    assert "target_hidden_size is not given: 12, by the shape of fc.weight" in caplog.text
    assert same(import_drafter(directory, target_embed_VxD=np.ones((V, 12))), config)


def test_switches_of_model_optimizer(flat):
    usual = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False}
    eagle = usual | {"eagle_aux_hidden_state_layer_ids": [], "parallel_draft_step": 1, "next_layer_regular": True}
    edit_config(flat, eagle_config=eagle)
    assert same(import_drafter(flat))
    for change in ({"use_last_layernorm": False}, {"use_mtp_layernorm": True}, {"parallel_draft_step": 4}):
        edit_config(flat, eagle_config=eagle | change)
        with pytest.raises(UserError, match=f"eagle_config: {next(iter(change))} = .* is not supported"):
            import_drafter(flat)


# The head.


@pytest.fixture
def whole(tmp_path) -> Path:
    """A drafter of the whole vocabulary, without a head."""
    directory = write(tmp_path, config=dataclasses.replace(PLAIN, draft_vocab_size=V), ids=np.arange(V))
    edit_tensors(directory, drop=("lm_head.weight",))
    return directory


HEAD = np.random.default_rng(1).normal(size=(V, E)).astype(np.float32)
EMBED = np.random.default_rng(2).normal(size=(V, E)).astype(np.float32)


@pytest.mark.parametrize("tied", [True, False, None])
@pytest.mark.parametrize("own", [True, False])
def test_a_missing_head_is_the_targets(whole, tied, own, caplog):
    edit_config(whole, tie_word_embeddings=tied)
    own_embed = EMBED + 1
    if own:
        edit_tensors(whole, embed_tokens__weight=own_embed)
    stored = import_drafter(whole, target_embed_VxD=EMBED, target_head=lambda: HEAD)
    wanted = HEAD if not tied else own_embed if own else EMBED
    np.testing.assert_array_equal(stored.params["lm_head"], wanted)
    assert stored.config.own_embed == own
    assert {name: value.shape for name, value in stored.params.items()} == parameter_shapes(stored.config)
    assert f"no lm_head.weight: the {'embedding (they are tied)' if tied else 'target'}" in caplog.text


def test_a_missing_head_without_the_target(whole, flat):
    with pytest.raises(UserError, match="lm_head.weight: missing .the target's head is used if"):
        import_drafter(whole)
    assert "lm_head" not in import_drafter(whole, headless=True).params
    with pytest.raises(UserError, match=r"missing, and the target's head has shape \[20, 9\], not \[20, 8\]"):
        import_drafter(whole, target_head=lambda: np.ones((V, E + 1)))
    edit_tensors(flat, drop=("lm_head.weight",))
    with pytest.raises(UserError, match="lm_head.weight: missing"):  # rows of which tokens, nobody knows
        import_drafter(flat, target_head=lambda: HEAD)


# The vocabulary.


def test_absolute_ids_in_d2t(drafter, caplog):
    edit_tensors(drafter, d2t=IDS.astype(np.int64))
    assert same(import_drafter(drafter)) and "d2t holds target ids, not offsets" in caplog.text
    order = np.array([3, 0, 5, 1, 4, 2])
    edit_tensors(drafter, d2t=IDS[order].astype(np.int64), lm_head__weight=params_of(PLAIN)["lm_head"][order])
    assert same(import_drafter(drafter))


def test_absolute_ids_without_a_mask(tmp_path, caplog):
    """They are told from offsets where these make no sense, or would leave no two ids side by side."""
    edit_tensors(write(tmp_path / "a"), drop=("t2d",), d2t=IDS.astype(np.int64))
    assert same(import_drafter(tmp_path / "a"))  # as offsets, the last would be 24 of 20
    assert "d2t holds target ids" in caplog.text
    caplog.clear()
    config = dataclasses.replace(PLAIN, vocab_size=200, draft_vocab_size=40)
    ids = np.sort(np.random.default_rng(0).permutation(100)[:40])
    write(tmp_path / "b", config=config, ids=ids)
    assert import_drafter(tmp_path / "b").target_ids_W.tolist() == ids.tolist() and not caplog.text
    edit_tensors(tmp_path / "b", drop=("t2d",), d2t=ids.astype(np.int64))
    assert import_drafter(tmp_path / "b").target_ids_W.tolist() == ids.tolist()
    assert "d2t holds target ids" in caplog.text


def test_the_draft_vocabulary_follows_from_d2t(drafter):
    edit_config(drafter, ("draft_vocab_size",))
    assert same(import_drafter(drafter))


# The files.


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "_orig_mod.module.", "module.model."])
def test_names_that_torch_wrapped(drafter, wrapper):
    edit_tensors(drafter, lambda name: wrapper + name)
    assert same(import_drafter(drafter))


@pytest.fixture
def pickles(flat, monkeypatch) -> Path:
    """Two `.bin` files with an index; what reads them is replaced, since torch is no requirement."""
    tensors = load_file(flat / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, flat / shard)
    (flat / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (flat / "model.safetensors").unlink()
    monkeypatch.setattr(torch_file, "open_tensors", huggingface.open_safetensors)
    return flat


def test_several_pickles_with_an_index(pickles):
    assert same(import_drafter(pickles))
    index = pickles / "pytorch_model.bin.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": weight_map | {"x.weight": weight_map["d2t"]}}))
    with pytest.raises(UserError, match="x.weight: not in pytorch_model-.*.bin, where the index says it is"):
        import_drafter(pickles)
    (pickles / weight_map["d2t"]).unlink()
    with pytest.raises(UserError, match=weight_map["d2t"]):
        import_drafter(pickles)


FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("text", "said"), [(POINTER, "Git LFS pointer"), (PAGE, "web page"), ("", "is empty")])
def test_files_that_are_not_what_they_are_called(flat, name, text, said):
    if "index" in name:
        (flat / "model.safetensors").unlink()
    (flat / name).write_text(text)
    with pytest.raises(UserError) as caught:
        import_drafter(flat)
    assert str(flat / name) in str(caught.value) and said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-1.bin"])
def test_pickles_that_are_pointers(flat, name):
    (flat / "model.safetensors").unlink()
    (flat / name).write_text(POINTER)
    (flat / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"d2t": name}}))
    with pytest.raises(UserError, match=f"{name}: is a Git LFS pointer, not the file itself: run `git lfs pull`"):
        import_drafter(flat)
