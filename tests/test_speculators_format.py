"""The speculators format, and drafters on their way from one format to the other."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from eagle3_files import IDS, PLAIN, VARIANTS, E, V, W, edit_config, edit_tensors, embed_of, params_of
from safetensors.numpy import load_file, save_file

from ppow_jax.errors import UserError
from ppow_jax.models.drafter_config import parameter_shapes
from ppow_jax.weights.drafters import best_format, export_drafter, import_drafter

ONLY_HERE = {
    "layers": dataclasses.replace(PLAIN, num_layers=3),
    "qwen3": dataclasses.replace(PLAIN, num_layers=2, qk_norm=True, attention_bias=True, output_bias=True),
}


def write(directory: Path, config, format: str | None = "speculators", **options) -> Path:
    export_drafter(directory, config, params_of(config), IDS, embed_VxE=embed_of(config), format=format, **options)
    return directory


def pass_on(source: Path, directory: Path, format: str) -> Path:
    config, params, ids, embed, _, name = import_drafter(source)
    export_drafter(directory, config, params, ids, dtype=None, target_name=name, embed_VxE=embed, format=format)
    return directory


def tensors(directory: Path) -> dict[str, bytes]:
    return {
        name: (str(value.dtype) + str(value.shape)).encode() + value.tobytes()
        for name, value in load_file(directory / "model.safetensors").items()
    }


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_flat_to_speculators_to_flat_is_byte_equal_in_every_tensor(tmp_path, config, dtype):
    write(tmp_path / "a", config, "flat", dtype=dtype, target_name="owner/model")
    pass_on(tmp_path / "a", tmp_path / "b", "speculators")
    pass_on(tmp_path / "b", tmp_path / "c", "flat")
    assert tensors(tmp_path / "a") == tensors(tmp_path / "c")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "c" / "config.json").read_bytes()
    there = import_drafter(tmp_path / "b")
    assert there.format == "speculators" and there.config == config and there.target_name == "owner/model"
    values = sorted(tensors(tmp_path / "b").values())
    assert values == sorted(tensors(tmp_path / "a").values())  # the names differ, the values do not


@pytest.mark.parametrize("config", ONLY_HERE.values(), ids=ONLY_HERE)
def test_what_only_this_format_holds(tmp_path, config):
    assert best_format(config) == "speculators"
    write(tmp_path / "a", config, None)
    pass_on(tmp_path / "a", tmp_path / "b", "speculators")
    assert import_drafter(tmp_path / "a").config == config
    assert tensors(tmp_path / "a") == tensors(tmp_path / "b")
    with pytest.raises(UserError, match="flat format has .*; the speculators format can represent this drafter"):
        pass_on(tmp_path / "a", tmp_path / "c", "flat")
    assert not (tmp_path / "c").exists()


def test_what_the_files_say(tmp_path):
    """The layout that vLLM and speculators rely on, spelt out."""
    config = dataclasses.replace(VARIANTS["eagle31"], num_layers=2)
    write(tmp_path, config, target_name="owner/model", target_architecture="Qwen3ForCausalLM")
    shapes = {name: list(value.shape) for name, value in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {
        "fc.weight": [E, 3 * E],
        "fc_norm.0.weight": [E],
        "fc_norm.1.weight": [E],
        "fc_norm.2.weight": [E],
        "layers.0.hidden_norm.weight": [E],
        **{f"layers.{n}.input_layernorm.weight": [E] for n in (0, 1)},
        **{f"layers.{n}.post_attention_layernorm.weight": [E] for n in (0, 1)},
        "layers.0.self_attn.q_proj.weight": [8, 2 * E],
        "layers.0.self_attn.k_proj.weight": [4, 2 * E],
        "layers.0.self_attn.v_proj.weight": [4, 2 * E],
        "layers.1.self_attn.q_proj.weight": [8, E],
        "layers.1.self_attn.k_proj.weight": [4, E],
        "layers.1.self_attn.v_proj.weight": [4, E],
        **{f"layers.{n}.self_attn.o_proj.weight": [E, 8] for n in (0, 1)},
        **{f"layers.{n}.mlp.{name}_proj.weight": [10, E] for n in (0, 1) for name in ("gate", "up")},
        **{f"layers.{n}.mlp.down_proj.weight": [E, 10] for n in (0, 1)},
        "norm.weight": [E],
        "lm_head.weight": [W, E],
        "d2t": [W],
        "t2d": [V],
    }
    said = json.loads((tmp_path / "config.json").read_text())
    layer = said.pop("transformer_layer_config")
    assert said == {
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": W,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": True,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": [2, 15, 27],
        "tie_word_embeddings": False,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": 5,
                    "verifier_accept_k": 1,
                    "accept_tolerance": 0.0,
                }
            ],
            "verifier": {"name_or_path": "owner/model", "architectures": ["Qwen3ForCausalLM"]},
        },
        "torch_dtype": "bfloat16",
    }
    assert layer["model_type"] == "llama" and layer["num_hidden_layers"] == 2 and layer["vocab_size"] == V


@pytest.fixture
def drafter(tmp_path) -> Path:
    return write(tmp_path / "drafter", PLAIN, dtype="float32")


def edit_layer(directory: Path, drop: tuple[str, ...] = (), **changes) -> None:
    layer = json.loads((directory / "config.json").read_text())["transformer_layer_config"] | changes
    edit_config(directory, transformer_layer_config={k: v for k, v in layer.items() if k not in drop})


def test_absent_keys_mean_what_vllm_takes_them_for(drafter, tmp_path):
    edit_config(drafter, ("norm_before_residual", "norm_output", "fc_norm", "eagle_aux_hidden_state_layer_ids"))
    edit_layer(drafter, ("rope_theta", "rms_norm_eps", "max_position_embeddings", "model_type", "hidden_act"))
    config = import_drafter(drafter, num_target_layers=32).config
    assert config == dataclasses.replace(
        PLAIN,
        norm_before_residual=True,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        max_position_embeddings=2048,
        feature_layers=(2, 16, 29),
    )
    assert import_drafter(drafter).config.feature_layers == ()
    there = pass_on(pass_on(drafter, tmp_path / "flat", "flat"), tmp_path / "back", "speculators")
    assert import_drafter(there, num_target_layers=32).config == config


def test_sizes_equal_to_the_defaults_may_be_absent(drafter):
    """transformers writes only what differs from its class; here everything differs, and shapes say so."""
    edit_layer(drafter, ("hidden_size", "num_hidden_layers"))
    with pytest.raises(UserError, match=r"fc.weight: has shape \[8, 24\], the config requires \[4096, 12288\]"):
        import_drafter(drafter)


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("scope", ["layers.0.", "midlayer."])
def test_other_spellings_and_the_targets_own_tensors(drafter, prefix, scope):
    def rename(name):
        return name if name in ("d2t", "t2d") else prefix + name.replace("layers.0.", scope)

    edit_tensors(drafter, rename, verifier_norm__weight=np.ones(E), verifier_lm_head__weight=np.ones((W, E)))
    stored = import_drafter(drafter)
    assert stored.config == PLAIN and stored.params.keys() == parameter_shapes(PLAIN).keys()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speculators_model_type": "eagle"}, "speculators_model_type = 'eagle' is not supported"),
        ({"speculators_model_type": None}, "speculators_model_type = None is not supported"),
        ({"architectures": ["MLPSpeculator"]}, "architectures = .* is not supported, only Eagle3DraftModel"),
        ({"transformer_layer_config": [1]}, "transformer_layer_config = .* must be an object"),
        ({"draft_vocab_size": 7}, r"lm_head.weight: has shape \[6, 8\], the config requires \[7, 8\]"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, "three ascending ids"),
        ({"fc_norm": True}, "fc_norm = True, but the weights lack"),
        ({"target_hidden_size": 9}, "fc.weight: has shape"),
    ],
)
def test_config_lies(drafter, changes, said):
    edit_config(drafter, **changes)
    with pytest.raises(UserError, match=said):
        import_drafter(drafter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "deepseek_v3"}, "model_type = 'deepseek_v3' is not supported, only llama or qwen3"),
        ({"model_type": ["llama"]}, "model_type = .* is not supported"),
        ({"model_type": "qwen3"}, "q_norm.weight: missing"),
        ({"layer_types": ["sliding_attention"]}, "sliding windows are not supported in drafters"),
        ({"num_hidden_layers": 2}, "layers.1.self_attn.q_proj.weight: missing"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000 must be an integer of 1..4096"),
        ({"hidden_size": 16}, "fc.weight: has shape"),
        ({"vocab_size": 5}, "draft_vocab_size = 6 must not exceed vocab_size = 5"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
    ],
)
def test_layer_config_lies(drafter, changes, said):
    edit_layer(drafter, **changes)
    with pytest.raises(UserError, match=said):
        import_drafter(drafter)


def test_both_norms_before_fc(drafter):
    norms = {f"fc_norm__{i}__weight": np.ones(E, np.float32) for i in range(3)}
    edit_tensors(drafter, input_norm__weight=np.ones(3 * E, np.float32), **norms)
    edit_config(drafter, fc_norm=True, norm_before_fc=True)
    with pytest.raises(UserError, match="only one can be"):
        import_drafter(drafter)


# torch's own files.


@pytest.fixture
def pickled(drafter) -> Path:
    """The weights as a `.bin` file that holds something else than tensors."""
    (drafter / "model.safetensors").rename(drafter / "pytorch_model.bin")
    return drafter


def test_pickled_weights_take_torch(pickled, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pytorch_model.bin: reading it requires torch \(pip install"):
        import_drafter(pickled)


def test_pickled_weights(drafter):
    torch = pytest.importorskip("torch")
    expected = import_drafter(drafter)
    values = load_file(drafter / "model.safetensors")
    (drafter / "model.safetensors").unlink()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        named = {name: torch.tensor(value) for name, value in values.items()}
        named = {name: x.to(dtype) if x.is_floating_point() else x for name, x in named.items()}
        for old in (True, False):
            torch.save(named, drafter / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
            stored = import_drafter(drafter)
            assert stored.config == expected.config
            assert str(stored.params["fc"].dtype) == str(dtype).removeprefix("torch.")
            np.testing.assert_allclose(stored.params["fc"].astype(np.float32), expected.params["fc"], rtol=0.01)
            np.testing.assert_array_equal(stored.target_ids_W, expected.target_ids_W)


class Malice:
    """Unpickled freely, it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_code_is_never_run(pickled, tmp_path):
    torch = pytest.importorskip("torch")
    for value in (Malice(tmp_path / "ran"), {"fc.weight": Malice(tmp_path / "ran")}, [1], {"fc.weight": 1}):
        torch.save(value, pickled / "pytorch_model.bin")
        with pytest.raises(UserError, match=r"pytorch_model.bin: (torch cannot read it|must contain a dictionary)"):
            import_drafter(pickled)
    for junk in (b"", b"PK\x03\x04", b"PK\x03\x04" + bytes(100), bytes(100)):
        (pickled / "pytorch_model.bin").write_bytes(junk)
        with pytest.raises(UserError, match="torch cannot read it as plain tensors"):
            import_drafter(pickled)
    assert not (tmp_path / "ran").exists()


def test_safetensors_come_before_pickles(drafter):
    (drafter / "pytorch_model.bin").write_bytes(b"junk")
    save_file(load_file(drafter / "model.safetensors"), drafter / "model.safetensors")
    assert import_drafter(drafter).config == PLAIN
