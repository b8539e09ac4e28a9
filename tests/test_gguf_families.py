"""GGUF files of the Qwen families and of Llama 3: names, biases, experts, scaled rotation."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import LAYER, TOP, Type, interleaved, metadata, write
from golden import families

from ppow_jax.errors import UserError
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.layers import rotation
from ppow_jax.models.rope import Factors
from ppow_jax.weights.gguf import load_target

ARCHITECTURES = {"qwen2": "qwen2", "qwen2-yarn": "qwen2", "qwen3": "qwen3", "qwen3-moe": "qwen3moe"}
NAMES = LAYER | {
    "router": "ffn_gate_inp",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    **{f"{x}_bias": f"attn_{x}" for x in "qkv"},
    "o_bias": "attn_output",
    **{f"{x}_bias": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def gguf_tensors(params: dict) -> dict[str, np.ndarray]:
    """As llama.cpp's converter names them."""
    tensors = {f"{TOP[name]}.weight": x for name, x in params.items() if name != "layers"}
    for n, layer in enumerate(params["layers"]):
        for name, x in layer.items():
            kind = "bias" if name.endswith("_bias") else "weight"
            tensors[f"blk.{n}.{NAMES[name]}{'_exps' * (x.ndim == 3)}.{kind}"] = x
    return tensors


def write_family(path: Path, name: str, kind=Type.F32, fields=(), tensors=()) -> Path:
    config, architecture = families.TARGETS[name], ARCHITECTURES.get(name, "llama")
    config = dataclasses.replace(config, eos_token_ids=(3,))
    entries = {key.replace("llama.", f"{architecture}."): value for key, value in metadata(config).items()}
    if config.experts:
        entries |= {
            f"{architecture}.expert_count": config.experts.number,
            f"{architecture}.expert_used_count": config.experts.per_token,
            f"{architecture}.expert_feed_forward_length": config.experts.intermediate_size,
        }
    if name == "qwen2-yarn":
        entries |= {
            f"{architecture}.rope.scaling.type": "yarn",
            f"{architecture}.rope.scaling.factor": config.rope_scaling.factor,
            f"{architecture}.rope.scaling.original_context_length": 32,
        }
    values = gguf_tensors(families.params(name))
    layers = range(config.num_layers)
    absent = {f"blk.{n}.{part}.weight": None for n in layers for part in LAYER.values()} | {"output.weight": None}
    return write(path, config, kind, architecture, entries | dict(fields), absent | values | dict(tensors))


def assert_close(config: ModelConfig, name: str) -> None:
    expected = dataclasses.replace(families.TARGETS[name], eos_token_ids=(3,), rms_norm_eps=1e-5)
    if isinstance(config.rope_scaling, Factors):
        config = dataclasses.replace(config, rope_scaling=expected.rope_scaling)
    assert config == expected


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_configs_and_tensors_of_the_qwen_families(tmp_path, name):
    config, params = load_target(write_family(tmp_path / "m.gguf", name))
    assert_close(config, name)
    expected = families.params(name)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_quantised_experts(tmp_path):
    """Blocks lie along the last axis, expert by expert."""
    names = {x: f"blk.1.ffn_{x}_exps.weight" for x in ("gate", "up", "down")}
    values = gguf_tensors(families.params("qwen3-moe"))
    wide = {name: np.resize(values[name], (6, 32, 32)) for name in names.values()}
    square = {f"blk.0.ffn_{x}.weight": np.ones((32, 32), np.float32) for x in names}  # blocks are 32 wide
    fields = dict.fromkeys(("qwen3moe.expert_feed_forward_length", "qwen3moe.feed_forward_length"), 32)
    path = write_family(tmp_path / "m.gguf", "qwen3-moe", Type.Q8_0, fields, square | wide)
    _, params = load_target(path)
    for x, name in names.items():
        error = np.abs(params["layers"][1][f"{x}_proj"] - wide[name])
        assert 0 < error.max() < 0.02


def test_llama3_scaling_comes_as_factors(tmp_path):
    """llama.cpp's converter turns it into one divisor for each frequency; the angles are the same."""
    config = families.TARGETS["llama3"]
    frequency_h = config.rope_theta ** (-np.arange(4) / 4)
    divisors = frequency_h / np.asarray(config.rope_scaling.scale(jnp.asarray(frequency_h), config.rope_theta))
    assert divisors.min() == pytest.approx(1) and divisors.max() == pytest.approx(4)
    values = gguf_tensors(families.params("llama3"))
    for name, value in values.items():
        if ".attn_q." in name or ".attn_k." in name:
            values[name] = interleaved(value, len(value) // config.head_dim)
    path = write_family(tmp_path / "m.gguf", "llama3", tensors=values | {"rope_freqs.weight": divisors})
    found, params = load_target(path)
    assert_close(found, "llama3")
    jax.tree.map(np.testing.assert_array_equal, params, families.params("llama3"))
    position = np.arange(100)[None]
    angles = [rotation(position, 8, config.rope_theta, x.rope_scaling) for x in (found, config)]
    np.testing.assert_allclose(*angles, atol=1e-4)
    assert ModelConfig.from_hf(found.to_hf(), "x") == found


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen2", {"tensors": {"blk.1.attn_k.bias": None}}, "layer 1 k_bias is missing"),
        ("qwen2", {"tensors": {"blk.1.attn_k_norm.weight": np.ones(8)}}, "unknown tensor blk.1.attn_k_norm.weight"),
        ("qwen3", {"tensors": {"blk.0.attn_q_norm.weight": np.ones(8)}}, "layer 0 q_norm has shape (8,)"),
        ("qwen3", {"tensors": {"blk.0.ffn_gate_inp.weight": np.ones((6, 32))}}, "unknown tensor blk.0.ffn_gate_inp"),
        ("qwen3-moe", {"fields": {"qwen3moe.expert_count": None}}, "'qwen3moe.expert_count' is missing"),
        ("qwen3-moe", {"fields": {"qwen3moe.expert_count": 7}}, "layer 1 gate_proj has shape (6, 24, 32)"),
        ("qwen3-moe", {"fields": {"qwen3moe.expert_used_count": 9}}, "num_experts_per_tok = 9 must not exceed"),
        ("qwen3-moe", {"tensors": {"blk.1.ffn_gate_inp.weight": None}}, "layer 1 router is missing"),
        ("qwen3-moe", {"tensors": {"blk.1.ffn_up.weight": np.ones((40, 32))}}, "duplicate tensor blk.1.ffn_up"),
        ("qwen3-moe", {"tensors": {"blk.9.ffn_gate.weight": np.ones((40, 32))}}, "mlp_only_layers = [0, 9]"),
        ("qwen3-moe", {"tensors": {"blk.1.ffn_up_shexp.weight": np.ones((24, 32))}}, "unknown tensor blk.1.ffn_up_sh"),
        ("qwen2-yarn", {"fields": {"qwen2.rope.scaling.factor": None}}, "factor = None"),
    ],
)
def test_broken_files_are_named(tmp_path, name, changes, said):
    path = write_family(tmp_path / "m.gguf", name, **changes)
    with pytest.raises(UserError) as error:
        load_target(path)
    assert str(path) in str(error.value) and said in str(error.value)
