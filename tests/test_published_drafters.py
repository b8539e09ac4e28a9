"""Drafters that were published for real models: their configs, written down, and every shape that follows from them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ppow_jax.models import drafter as drafting
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.drafter_config import parameter_shapes, validate_fit
from ppow_jax.models.layers import KV
from ppow_jax.speculation.propose import propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.weights import drafter_tensors
from ppow_jax.weights.drafters import describe, import_drafter

FLAT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
    "draft_vocab_size": 32000,
    "use_cache": True,
    "initializer_range": 0.02,
}
LLAMA = FLAT | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-05,
    "vocab_size": 128256,
    "torch_dtype": "float16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 0,
}
QWEN = FLAT | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 128,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
QWEN_8B = QWEN | {"hidden_size": 4096, "num_key_value_heads": 8, "max_position_embeddings": 40960}
QWEN_30B = QWEN | {"hidden_size": 2048, "num_key_value_heads": 4, "max_position_embeddings": 2048}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": 32000,
    "norm_before_residual": True,
    "target_hidden_size": None,
    "tie_word_embeddings": False,
    "transformer_layer_config": {
        "model_type": "llama",
        "head_dim": 128,
        "intermediate_size": 14336,
        "num_hidden_layers": 1,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "vocab_size": 128256,
    },
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
        "verifier": {"name_or_path": "meta-llama/Llama-3.1-8B-Instruct", "architectures": ["LlamaForCausalLM"]},
    },
}


def layer(E: int, q: int, kv: int, wide: int) -> dict[str, list[int]]:
    return {
        "midlayer.input_layernorm.weight": [E],
        "midlayer.hidden_norm.weight": [E],
        "midlayer.post_attention_layernorm.weight": [E],
        "midlayer.self_attn.q_proj.weight": [q, 2 * E],
        "midlayer.self_attn.k_proj.weight": [kv, 2 * E],
        "midlayer.self_attn.v_proj.weight": [kv, 2 * E],
        "midlayer.self_attn.o_proj.weight": [E, q],
        "midlayer.mlp.gate_proj.weight": [wide, E],
        "midlayer.mlp.up_proj.weight": [wide, E],
        "midlayer.mlp.down_proj.weight": [E, wide],
        "fc.weight": [E, 3 * E],
        "norm.weight": [E],
        "lm_head.weight": [32000, E],
    }


EAGLE31 = {f"fc_norm.{i}.weight": [2048] for i in range(3)}
BIG, SMALL = layer(4096, 4096, 1024, 14336), layer(2048, 4096, 512, 12288)
EMBED = {"embed_tokens.weight": [128256, 4096]}
# name -> config.json, tensors in the file, the target's layers and width, feature layers, parameters in millions
PUBLISHED = {
    "Llama-3.1-8B": (LLAMA, BIG, 32, 4096, (2, 16, 29), 424.7),
    "Llama-3.1-8B, speculators": (SPECULATORS, BIG | EMBED, 32, 4096, (2, 16, 29), 424.7),
    "Qwen3-8B": (QWEN_8B, layer(4096, 4096, 1024, 12288), 36, 4096, (2, 18, 33), 399.5),
    "Qwen3-30B-A3B": (QWEN_30B, SMALL, 48, 2048, (2, 24, 45), 183.0),
    "Qwen3-30B-A3B, EAGLE-3.1": (
        QWEN_30B | {"fc_norm": True, "norm_output": True},
        SMALL | EAGLE31,
        48,
        2048,
        (2, 24, 45),
        183.0,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shape_of_published_drafters(name):
    json_config, tensors, num_layers, width, layers, millions = PUBLISHED[name]
    config = describe(json.loads(json.dumps(json_config)), tensors.keys(), num_layers, name)
    assert {key: list(shape) for key, shape in drafter_tensors.stored_shapes(config).items()} == tensors
    assert config.feature_layers == layers and config.draft_vocab_size == 32000
    assert config.norm_before_residual == (json_config is SPECULATORS)
    assert config.fc_norm == config.norm_output == name.endswith("EAGLE-3.1")
    assert (config.rope_scaling is not None) == (json_config is SPECULATORS)
    params = jax.eval_shape(lambda: drafting.init(jax.random.key(0), config))
    assert {key: value.shape for key, value in params.items()} == parameter_shapes(config)
    assert sum(value.size for value in params.values()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_they_draft(name):
    """Two rows draft four tokens each, in shapes alone."""
    json_config, tensors, num_layers, width, _, _ = PUBLISHED[name]
    config = describe(json_config, tensors.keys(), num_layers, name)
    V, E, W, L, d = config.vocab_size, config.hidden_size, 32000, 64, config.head_dim
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    params = {key: shape(*sizes) for key, sizes in parameter_shapes(config).items()}
    embed = shape(V, E) if config.own_embed else None
    drafter = Drafter(config, params, jax.ShapeDtypeStruct((W,), jnp.int32), embed_VxE=embed)
    kv = (KV(shape(2, config.num_kv_heads, d, L), shape(2, config.num_kv_heads, L, d)),)

    def draft(drafter, embed_VxD, features_Bx1xF, kv):
        g_Bx1xE = drafting.fuse(drafter, features_Bx1xF)
        prefix = [drafting.Prefix(kv, jnp.ones((2, 1, L), bool))]
        tokens, key_B = jnp.zeros((2, 1), jnp.int32), jax.random.split(jax.random.key(0), 2)
        return propose(drafter, embed_VxD, g_Bx1xE, tokens, tokens, prefix, 4, Sampling(1.0), key_B)

    made = jax.eval_shape(draft, drafter, shape(V, width), shape(2, 1, 3 * width), kv)
    assert made.token_BxMxK.shape == (2, 1, 4) and made.log_q_BxMxKxW.shape == (2, 1, 4, W)


def test_they_fit_their_target_alone():
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
    }
    target = ModelConfig.from_hf(llama, "Llama-3.1-8B")
    for name, (json_config, tensors, num_layers, *_) in PUBLISHED.items():
        config = describe(json_config, tensors.keys(), num_layers, name)
        if name.startswith("Llama"):
            validate_fit(config, target, name)
        else:
            with pytest.raises(Exception, match="vocabulary of 151936 tokens, the target has 128256"):
                validate_fit(config, target, name)


def test_a_drafter_as_published_loads(tmp_path):
    """The Llama config with every size divided by 64, as a file with the tensors that it has."""
    small = {"hidden_size": 64, "intermediate_size": 224, "vocab_size": 2004, "draft_vocab_size": 500}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | small))
    config = describe(LLAMA | small, set(), 32, "small")
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=shape).astype(np.float16)
        for name, shape in drafter_tensors.stored_shapes(config).items()
    }
    ids_W = np.sort(rng.choice(2004, 500, replace=False))
    maps = {"d2t": ids_W - np.arange(500), "t2d": np.isin(np.arange(2004), ids_W)}
    save_file(tensors | maps, tmp_path / "model.safetensors")
    stored = import_drafter(tmp_path, num_target_layers=32)
    assert stored.config == dataclasses.replace(config, feature_layers=(2, 16, 29))
    np.testing.assert_array_equal(stored.target_ids_W, ids_W)
    np.testing.assert_array_equal(stored.params["down_proj"], tensors["midlayer.mlp.down_proj.weight"])
