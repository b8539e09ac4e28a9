"""The shapes of published models, from their configs as they are published; no weights are needed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.models import transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.weights import layout

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN3 = {
    "attention_bias": False,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
CONFIGS = {
    "Llama-3.1-8B": LLAMA3
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "Llama-3.3-70B": LLAMA3
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "Qwen3-8B": QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
    },
    "Qwen3-32B": QWEN3
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "max_window_layers": 64,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
    },
    "Qwen3-30B-A3B": QWEN3
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
    },
}
# Published sizes: tensors in the checkpoint, and its parameters.
SIZES = {
    "Llama-3.1-8B": (291, 8_030_261_248),
    "Llama-3.3-70B": (723, 70_553_706_496),
    "Qwen3-8B": (399, 8_190_735_360),
    "Qwen3-32B": (707, 32_762_123_264),
    "Qwen3-30B-A3B": (18867, 30_532_122_624),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_and_shapes(name):
    config = ModelConfig.from_hf(CONFIGS[name], name)
    found = layout.expected(layout.sources(config))
    assert (len(found), sum(int(np.prod(shape)) for shape in found.values())) == SIZES[name]
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config, jnp.bfloat16))
    assert jax.tree.map(lambda x: x.shape, shapes) == transformer.shapes(config)
    first = found["model.layers.0.self_attn.q_proj.weight"]
    assert first == (config.num_heads * 128, config.hidden_size)
    if name.startswith("Qwen3"):
        assert found["model.layers.3.self_attn.q_norm.weight"] == (128,)
    if config.experts:
        assert found["model.layers.47.mlp.gate.weight"] == (128, 2048)
        assert found["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_has_the_published_widths(name):
    config = dataclasses.replace(ModelConfig.from_hf(CONFIGS[name], name), num_layers=3)

    def run(params, tokens):
        position = jnp.broadcast_to(jnp.arange(4), (1, 4))
        out = transformer.forward(params, config, tokens, position, transformer.causal_mask(1, 4), feature_layers=(2,))
        return out, transformer.logits(params, out.hidden_BxSxD)

    params = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), transformer.shapes(config), is_leaf=is_shape
    )
    out, logits = jax.eval_shape(run, params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    assert logits.shape == (1, 4, config.vocab_size) and out.features_BxSxF.shape == (1, 4, config.hidden_size)
    assert len(out.kv) == 3
    assert out.kv[0].v_BxKvxLxd.shape == (1, config.num_kv_heads, 4, 128)
    assert len(out.experts) == (3 if config.experts else 0)


def is_shape(x) -> bool:
    return isinstance(x, tuple)
