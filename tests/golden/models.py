"""Small random models that numpy alone rebuilds, so that values made with torch can be checked without it.

`python -m tests.golden.make` writes the values.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter_config import DrafterConfig, is_vector, parameter_shapes
from ppow_jax.models.rope import Linear

_target = functools.partial(ModelConfig, architecture="LlamaForCausalLM", max_position_embeddings=128)
TARGETS = {
    "untied": _target(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        eos_token_ids=(7,),
    ),
    "tied": _target(  # heads that are wider together than the hidden state; one key/value head
        vocab_size=40,
        hidden_size=24,
        intermediate_size=64,
        num_layers=2,
        num_heads=3,
        num_kv_heads=1,
        head_dim=16,
        rms_norm_eps=1e-3,
        rope_theta=500.0,
        tie_word_embeddings=True,
        eos_token_ids=(3, 11),
    ),
}
FEATURE_LAYERS = {"untied": (0, 1, 2), "tied": (0, 1)}  # Hugging Face's hidden_states[i] before the last
NEW_TOKENS = 24


_DRAFTER = DrafterConfig(
    vocab_size=30,
    draft_vocab_size=12,
    hidden_size=16,
    intermediate_size=20,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    rms_norm_eps=1e-5,
    rope_theta=1000.0,
    max_position_embeddings=128,
    target_hidden_size=16,
    feature_layers=(1, 2, 3),
    fc_norm=False,
)
_BIASES = {"attention_bias": True, "output_bias": True}
_KINDS: dict[str, dict[str, Any]] = {
    "00": {},
    "01": {"norm_before_residual": True},
    "10": {"fc_norm": True, "norm_output": True},
    "11": {"fc_norm": True, "norm_output": True, "norm_before_residual": True},
    "bias": {"norm_before_fc": True, **_BIASES},
    "narrow": {"target_hidden_size": 24, "own_embed": True, "qk_norm": True, "rope_scaling": Linear(3.0)},
    "layers": {"num_layers": 3},
    "everything": {  # and wider than the target
        "num_layers": 2,
        "qk_norm": True,
        "norm_before_residual": True,
        "target_hidden_size": 12,
        "own_embed": True,
        "fc_norm": True,
        "norm_output": True,
        **_BIASES,
    },
}
DRAFTERS = {name: dataclasses.replace(_DRAFTER, **changes) for name, changes in _KINDS.items()}
DRAFT_STEPS = 3


def target_params(config: ModelConfig, seed: int = 0) -> dict:
    """Weights large enough that the next token is far from uniform (numpy promises RandomState's stream)."""
    random, D = np.random.RandomState(seed), config.hidden_size
    q, kv, wide = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    layers = [
        {
            "input_norm": norm(random, D),
            "q_proj": matrix(random, q, D),
            "k_proj": matrix(random, kv, D),
            "v_proj": matrix(random, kv, D),
            "o_proj": matrix(random, D, q),
            "post_norm": norm(random, D),
            "gate_proj": matrix(random, wide, D),
            "up_proj": matrix(random, wide, D),
            "down_proj": matrix(random, D, wide),
        }
        for _ in range(config.num_layers)
    ]
    params = {"embed": matrix(random, config.vocab_size, D), "layers": layers, "norm": norm(random, D)}
    return params if config.tie_word_embeddings else params | {"lm_head": matrix(random, config.vocab_size, D)}


def drafter_params(config: DrafterConfig, seed: int = 1) -> dict:
    """Matrices first, norms after them: values of the plain drafters stay what they were."""
    random, shapes = np.random.RandomState(seed), parameter_shapes(config)
    matrices = [name for name in shapes if not is_vector(name)]
    params = {name: matrix(random, *shapes[name]) for name in matrices}
    scales = ["input_norm", "hidden_norm", "post_norm", "norm"]
    vectors = scales + [name for name in shapes if is_vector(name) and name not in scales]
    for name in vectors:
        params[name] = (norm if name.endswith("norm") else matrix)(random, *shapes[name])
    return params


def drafter_inputs(config: DrafterConfig, B: int = 2, T: int = 7, seed: int = 2) -> dict[str, np.ndarray]:
    """features_BxTxF of the target; embed_SxBxTxE: at step s, what token i + 1 + s embeds to, seen from anchor i."""
    random = np.random.RandomState(seed)
    return {
        "features_BxTxF": matrix(random, B, T, 3 * config.target_hidden_size, scale=2.0),
        "embed_SxBxTxE": matrix(random, DRAFT_STEPS, B, T, config.hidden_size, scale=0.5),
    }


def prompts(config: ModelConfig, number: int = 6, seed: int = 3) -> list[np.ndarray]:
    """Token ids of ragged prompts."""
    random = np.random.RandomState(seed)
    return [random.randint(0, config.vocab_size, random.randint(1, 12)) for _ in range(number)]


def matrix(random: np.random.RandomState, *shape: int, scale: float = 0.3) -> np.ndarray:
    return (random.standard_normal(shape) * scale).astype(np.float32)


def norm(random: np.random.RandomState, *shape: int) -> np.ndarray:
    return (1 + 0.3 * random.standard_normal(shape)).astype(np.float32)
