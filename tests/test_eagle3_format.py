"""The flat EAGLE-3 format: out, in again byte for byte, and everything that must be refused."""

import dataclasses
import json
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from eagle3_files import IDS, PLAIN, VARIANTS, E, V, W, edit_config, edit_tensors, embed_of, params_of
from safetensors.numpy import load_file, save_file

from ppow_jax.errors import UserError
from ppow_jax.weights.card import write_card
from ppow_jax.weights.drafters import export_drafter, import_drafter


@pytest.fixture
def drafter(tmp_path) -> Path:
    """A directory with a plain drafter in float32."""
    export_drafter(tmp_path / "drafter", PLAIN, params_of(PLAIN), IDS, dtype="float32")
    return tmp_path / "drafter"


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip_is_byte_equal(tmp_path, config, dtype):
    params, embed = params_of(config), embed_of(config)
    export_drafter(
        tmp_path / "a", config, params, IDS, dtype=dtype, target_name="owner/model", embed_VxE=embed
    )
    config_2, params_2, ids, embed_2, format, name = import_drafter(tmp_path / "a")
    export_drafter(tmp_path / "b", config_2, params_2, ids, dtype=None, target_name=name, embed_VxE=embed_2)
    assert config_2 == config and format == "flat" and name == "owner/model"
    assert ids.dtype == np.int32 and ids.tolist() == IDS.tolist()
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert params_2.keys() == params.keys()
    for name, value in params.items():
        np.testing.assert_array_equal(params_2[name], value.astype(params_2[name].dtype))
        assert str(params_2[name].dtype) == dtype


@pytest.mark.parametrize("text", ['{"confidence_weight": [0.5], "confidence_bias": 0.2}', "{"])
def test_a_part_that_earlier_versions_wrote_is_ignored(drafter, caplog, text):
    before = import_drafter(drafter)
    (drafter / "confidence_head.json").write_text(text)
    with caplog.at_level(logging.INFO):
        after = import_drafter(drafter)
    (record,) = caplog.records
    assert record.levelno == logging.INFO and f"{drafter / 'confidence_head.json'}: ignored" in record.message
    assert after.config == before.config and after.params.keys() == before.params.keys()
    for name, value in before.params.items():
        np.testing.assert_array_equal(after.params[name], value)


def test_what_the_files_say(tmp_path):
    """The layout that other people's loaders rely on, spelt out."""
    export_drafter(tmp_path, VARIANTS["eagle31"], params_of(VARIANTS["eagle31"]), IDS)
    shapes = {
        name: (list(t.shape), str(t.dtype)) for name, t in load_file(tmp_path / "model.safetensors").items()
    }
    assert shapes == {
        "fc.weight": ([E, 3 * E], "bfloat16"),
        "fc_norm.0.weight": ([E], "bfloat16"),
        "fc_norm.1.weight": ([E], "bfloat16"),
        "fc_norm.2.weight": ([E], "bfloat16"),
        "midlayer.input_layernorm.weight": ([E], "bfloat16"),
        "midlayer.hidden_norm.weight": ([E], "bfloat16"),
        "midlayer.post_attention_layernorm.weight": ([E], "bfloat16"),
        "midlayer.self_attn.q_proj.weight": ([8, 2 * E], "bfloat16"),
        "midlayer.self_attn.k_proj.weight": ([4, 2 * E], "bfloat16"),
        "midlayer.self_attn.v_proj.weight": ([4, 2 * E], "bfloat16"),
        "midlayer.self_attn.o_proj.weight": ([E, 8], "bfloat16"),
        "midlayer.mlp.gate_proj.weight": ([10, E], "bfloat16"),
        "midlayer.mlp.up_proj.weight": ([10, E], "bfloat16"),
        "midlayer.mlp.down_proj.weight": ([E, 10], "bfloat16"),
        "norm.weight": ([E], "bfloat16"),
        "lm_head.weight": ([W, E], "bfloat16"),
        "d2t": ([W], "int64"),
        "t2d": ([V], "bool"),
    }
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["d2t"].tolist() == [1, 1, 3, 8, 14, 14]
    assert np.flatnonzero(tensors["t2d"]).tolist() == IDS.tolist()
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": V,
        "draft_vocab_size": W,
        "tie_word_embeddings": False,
        "hidden_size": E,
        "intermediate_size": 10,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "attention_bias": False,
        "mlp_bias": False,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": [2, 15, 27],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 14, 26], "use_aux_hidden_state": True},
        "fc_norm": True,
        "norm_output": True,
        "torch_dtype": "bfloat16",
    }


SPELLINGS = {
    "layers.0": lambda name: name.replace("midlayer.", "layers.0."),
    "model.midlayer": lambda name: name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}",
    "model.layers.0": lambda name: "model." + name.replace("midlayer.", "layers.0."),
}


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_other_spellings(drafter, spelling):
    edit_tensors(drafter, spelling, midlayer__self_attn__rotary_emb__inv_freq=np.ones(2, np.float32))
    config, params, ids = import_drafter(drafter)[:3]
    assert config == PLAIN and ids.tolist() == IDS.tolist()
    for name, value in params_of(PLAIN).items():
        np.testing.assert_array_equal(params[name], value)


def test_both_spellings_at_once(drafter):
    edit_tensors(drafter, layers__0__mlp__up_proj__weight=np.ones((10, E), np.float32))
    with pytest.raises(UserError, match="up_proj.weight: duplicated"):
        import_drafter(drafter)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("drop", [(), ("t2d",)])
def test_unsorted_ids_take_the_head_with_them(drafter, dtype, drop):
    order = np.array([3, 0, 5, 1, 4, 2])
    head = params_of(PLAIN)["lm_head"]
    d2t = (IDS[order] - np.arange(W)).astype(dtype)
    edit_tensors(drafter, drop=drop, d2t=d2t, lm_head__weight=head[order])
    _, params, ids = import_drafter(drafter)[:3]
    assert ids.tolist() == IDS.tolist()
    np.testing.assert_array_equal(params["lm_head"], head)


def test_t2d_alone(drafter):
    edit_tensors(drafter, drop=("d2t",))
    assert import_drafter(drafter)[2].tolist() == IDS.tolist()
    mask = np.zeros(V, np.bool_)
    mask[:5] = True
    edit_tensors(drafter, t2d=mask)
    with pytest.raises(UserError, match="t2d: marks 5 tokens, draft_vocab_size is 6"):
        import_drafter(drafter)


@pytest.mark.parametrize("draft_vocab_size", [V, None])
def test_whole_vocabulary_needs_no_maps(tmp_path, draft_vocab_size):
    config = dataclasses.replace(PLAIN, draft_vocab_size=V)
    export_drafter(tmp_path, config, params_of(config), np.arange(V))
    edit_tensors(tmp_path, drop=("d2t", "t2d"))
    edit_config(tmp_path, draft_vocab_size=draft_vocab_size)
    assert import_drafter(tmp_path)[2].tolist() == list(range(V))


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([1, 0, 3, 8, 14, 14], "different target ids of 0..19"),
        ([-1, 1, 3, 8, 14, 14], "different target ids of 0..19"),
        ([1, 1, 3, 8, 14, 15], "different target ids of 0..19"),
        ([2**63 - 1] * W, "different target ids of 0..19"),
        ([0, 1, 3, 8, 14, 14], "t2d: marks other tokens than d2t names"),
    ],
)
def test_bad_ids(drafter, offsets, said):
    edit_tensors(drafter, d2t=np.array(offsets, np.int64))
    with pytest.raises(UserError, match=said):
        import_drafter(drafter)


def test_all_problems_in_one_message(drafter):
    edit_tensors(
        drafter,
        drop=("norm.weight", "d2t", "t2d"),
        fc__weight=np.ones((E, E), np.float32),
        lm_head__bias=np.ones(W, np.float32),
        lm_head__weight=np.ones((W, E), np.int32),
    )
    with pytest.raises(UserError) as caught:
        import_drafter(drafter)
    for said in (
        "norm.weight: missing",
        "fc.weight: has shape [8, 8], the config requires [8, 24]",
        "lm_head.bias: unknown",
        "lm_head.weight: has type I32",
        "d2t: missing",
    ):
        assert said in str(caught.value)


def test_layer_ids(drafter):
    """`eagle_config` counts outputs, a key at the top inputs; without both the target's depth decides."""
    edit_config(drafter, ("eagle_config",), eagle_aux_hidden_state_layer_ids=[2, 16, 29])
    assert import_drafter(drafter)[0].feature_layers == (2, 16, 29)
    edit_config(drafter, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 3]})
    with pytest.raises(UserError, match=r"\[2, 16, 29\] \(inputs of layers\) contradicts"):
        import_drafter(drafter)
    edit_config(drafter, ("eagle_aux_hidden_state_layer_ids",))
    assert import_drafter(drafter)[0].feature_layers == (1, 2, 4)
    edit_config(drafter, ("eagle_config",))
    assert import_drafter(drafter, num_target_layers=32)[0].feature_layers == (2, 16, 29)
    assert import_drafter(drafter)[0].feature_layers == ()


def test_missing_norm_before_residual_is_false(drafter):
    edit_config(drafter, ("norm_before_residual", "rope_theta", "torch_dtype"))
    config = import_drafter(drafter)[0]
    assert config.norm_before_residual is False
    assert config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["Eagle3DraftModel"]}, "only one of LlamaForCausalLMEagle3"),
        ({"speculators_model_type": "eagle"}, "speculators_model_type = 'eagle' is not supported"),
        ({"speculators_model_type": "eagle3"}, "transformer_layer_config = None must be an object"),
        ({"vocab_size": V + 1}, r"t2d: has shape \[20\], the config requires \[21\]"),
        ({"draft_vocab_size": W + 1}, r"lm_head.weight: has shape \[6, 8\], the config requires \[7, 8\]"),
        ({"draft_vocab_size": V + 1}, "draft_vocab_size = 21 must not exceed vocab_size = 20"),
        ({"draft_vocab_size": "6"}, "draft_vocab_size = '6' must be a positive integer"),
        ({"hidden_size": 16}, "fc.weight: has shape"),
        ({"target_hidden_size": 16}, r"fc.weight: has shape \[8, 24\], the config requires \[8, 48\]"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0 must be an integer of 1..4096"),
        ({"fc_norm": True}, "fc_norm = True, but the weights lack fc_norm.0"),
        ({"norm_before_fc": True}, "norm_before_fc = True, but the weights lack input_norm.weight"),
        ({"norm_before_residual": "no"}, "norm_before_residual = 'no' must be true or false"),
        ({"attention_bias": True}, "q_proj.bias: missing"),
        ({"mlp_bias": True}, "mlp_bias = True is not supported"),
        ({"eagle_config": [1]}, r"eagle_config = \[1\] must be an object"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state = False"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 14, 26]}}, "contradicts"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, "2", 3]}}, "must be a list of layer ids"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [5, 2, 3]}}, "three ascending ids"),
    ],
)
def test_config_lies(drafter, changes, said):
    edit_config(drafter, **changes)
    with pytest.raises(UserError, match=said):
        import_drafter(drafter)


def test_embedding_is_left_out_only_if_it_is_the_targets(drafter):
    embed = np.random.default_rng(1).normal(size=(V, E)).astype(np.float32)
    edit_tensors(drafter, embed_tokens__weight=embed.astype(ml_dtypes.bfloat16))
    copy = import_drafter(drafter, target_embed_VxD=embed)
    assert copy.config == PLAIN and copy.embed_VxE is None
    for other in (None, embed + 1, embed[:, 1:]):
        own = import_drafter(drafter, target_embed_VxD=other)
        assert own.config == dataclasses.replace(PLAIN, own_embed=True)
        np.testing.assert_array_equal(own.embed_VxE, embed.astype(ml_dtypes.bfloat16))
    edit_tensors(drafter, embed_tokens__weight=embed[1:])
    with pytest.raises(UserError, match=r"embed_tokens.weight: has shape \[19, 8\]"):
        import_drafter(drafter)


def test_sharded_and_absent_weights(drafter):
    tensors = load_file(drafter / "model.safetensors")
    shards = {"a.safetensors": sorted(tensors)[::2], "b.safetensors": sorted(tensors)[1::2]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, drafter / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (drafter / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (drafter / "model.safetensors").unlink()
    np.testing.assert_array_equal(import_drafter(drafter).params["fc"], params_of(PLAIN)["fc"])
    (drafter / "b.safetensors").unlink()
    with pytest.raises(UserError, match="b.safetensors"):
        import_drafter(drafter)
    (drafter / "model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="contains none of model.safetensors, .*pytorch_model.bin"):
        import_drafter(drafter)
    with pytest.raises(UserError, match="config.json"):
        import_drafter(drafter / "nowhere")


def test_not_finite(drafter, tmp_path):
    params = params_of(PLAIN)
    params["fc"][0, 0] = 1e6
    with pytest.raises(UserError, match="fc has values that are not finite in float16"):
        export_drafter(tmp_path / "new", PLAIN, params, IDS, dtype="float16")
    assert not (tmp_path / "new").exists()
    params["fc"][0, 0] = np.nan
    edit_tensors(drafter, fc__weight=params["fc"])
    with pytest.raises(UserError, match="fc: not finite"):
        import_drafter(drafter)


def test_export_checks_what_it_is_given(tmp_path):
    params = params_of(PLAIN)
    with pytest.raises(UserError, match="dtype = 'int8' must be one of bfloat16"):
        export_drafter(tmp_path, PLAIN, params, IDS, dtype="int8")
    for bad_ids in (IDS[::-1], IDS[1:], IDS + 1):
        with pytest.raises(ValueError, match="ascending target ids"):
            export_drafter(tmp_path, PLAIN, params, bad_ids)
    for bad in (params | {"fc_norm": np.ones((3, E))}, params | {"fc": params["fc"].T}):
        with pytest.raises(ValueError, match="names and shapes"):
            export_drafter(tmp_path, PLAIN, bad, IDS)


def test_export_over_an_older_one_keeps_the_card(drafter):
    (drafter / "README.md").write_text("mine")
    config = VARIANTS["eagle31"]
    export_drafter(drafter, config, params_of(config), IDS)
    assert import_drafter(drafter)[0] == config
    assert sorted(files(drafter)) == ["README.md", "config.json", "model.safetensors"]


def test_model_card(tmp_path):
    row = {
        "benchmark": "mt|bench",
        "mode": "chain",
        "temperature": 0.0,
        "batch_size": 1,
        "window": 5,
        "tau": 2.345,
        "speedup": 1.5,
        "identical": 20,
        "total": 20,
        "acceptance_by_position": [0.7, 0.6],
    }
    write_card(
        tmp_path,
        title="A drafter",
        target="owner/model",
        figures=[row],
        command="make it",
        notes="On a laptop.",
    )
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["eagle3", "speculative-decoding", "draft-model", "vllm", "sglang"],
        "base_model": "owner/model",
    }
    assert "| mt\\|bench | chain | 0.0 | 1 | 5 | 2.35 | 1.50 | – | – | 20 / 20 | 0.70 0.60 |" in body
    for said in (
        "# A drafter",
        "make it",
        "On a laptop.",
        "vllm serve owner/model",
        "DRAFTER=.\n",
        """"model": "'"$DRAFTER"'",""",
        '"num_speculative_tokens": 5',
    ):
        assert said in body
    assert "--speculative-num-draft-tokens 6" in body


def test_model_card_without_figures(tmp_path):
    write_card(tmp_path, title="T", target="smollm2-135m", figures=[], command="c")
    text = (tmp_path / "README.md").read_text()
    assert "Not measured yet." in text and 'base_model: "HuggingFaceTB/SmolLM2-135M-Instruct"' in text
    assert "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct" in text and "--target=smollm2-135m" in text
    write_card(tmp_path, title="T", target="./mine", figures=[], command="c")
    assert "base_model" not in (tmp_path / "README.md").read_text()
    write_card(tmp_path, title="T", target="./mine", base_model="me/mine", figures=[], command="c")
    text = (tmp_path / "README.md").read_text()
    assert 'base_model: "me/mine"' in text and "vllm serve me/mine" in text and "--target=./mine" in text
