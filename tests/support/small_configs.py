"""Descriptions of small models, once for all tests: configs of targets and drafters, and entries of config.json files.

Those of `golden` are the models that other implementations computed values of.
"""

import dataclasses
from typing import Any

from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter_config import DrafterConfig
from ppow_jax.weights import tiny
from tests.golden import models

LLAMA: dict[str, Any] = {  # config.json of SmolLM2
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
LLAMA3 = {  # rotary entries
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

NARROW_TINY = dataclasses.replace(  # the target `tiny`, narrower
    tiny.CONFIG, hidden_size=16, intermediate_size=16, num_heads=2, num_kv_heads=1, head_dim=8
)


def read(**changes) -> ModelConfig:
    """LLAMA with changes, as `from_hf` reads it."""
    return ModelConfig.from_hf(LLAMA | changes, "some/config.json")


def target_config(**changes) -> ModelConfig:
    """A Llama of three layers and 61 tokens, with changes: the shapes of a golden model."""
    own = {"max_position_embeddings": 512, "eos_token_ids": (60,)}
    return dataclasses.replace(models.TARGETS["untied"], **own | changes)


def drafter_config(target: ModelConfig, draft_vocab_size: int, **changes) -> DrafterConfig:
    """A drafter as wide as its target, that reads the inputs of three layers; with changes."""
    config = DrafterConfig(
        vocab_size=target.vocab_size,
        draft_vocab_size=draft_vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
        max_position_embeddings=target.max_position_embeddings,
        target_hidden_size=target.hidden_size,
        feature_layers=(0, 1, 2),
        fc_norm=False,
    )
    return dataclasses.replace(config, **changes)
