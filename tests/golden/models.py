"""Small random models that numpy alone rebuilds, so that values made with torch can be checked without it.

`python -m experiments.parity --make_golden=tests/golden` writes the values.
"""

import functools

import numpy as np

from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter_config import DrafterConfig

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


def drafter_config(fc_norm: bool, norm_before_residual: bool) -> DrafterConfig:
    return DrafterConfig(
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
        fc_norm=fc_norm,
        norm_before_residual=norm_before_residual,
    )


DRAFTERS = {f"{int(n)}{int(r)}": drafter_config(n, r) for n in (False, True) for r in (False, True)}
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
    random, E, D = np.random.RandomState(seed), config.hidden_size, config.target_hidden_size
    q, kv, wide = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.intermediate_size
    params = {
        "fc": matrix(random, E, 3 * D),
        "q_proj": matrix(random, q, 2 * E),
        "k_proj": matrix(random, kv, 2 * E),
        "v_proj": matrix(random, kv, 2 * E),
        "o_proj": matrix(random, E, q),
        "gate_proj": matrix(random, wide, E),
        "up_proj": matrix(random, wide, E),
        "down_proj": matrix(random, E, wide),
        "lm_head": matrix(random, config.draft_vocab_size, E),
    }
    params |= {name: norm(random, E) for name in ("input_norm", "hidden_norm", "post_norm", "norm")}
    return params | ({"fc_norm": norm(random, 3, D)} if config.fc_norm else {})


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
