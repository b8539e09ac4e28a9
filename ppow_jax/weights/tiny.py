"""The tiny random target used by tests and `tiny.flags`: real code paths in seconds, no download."""

from ppow_jax.data.encoding import tiny_tokenizer as tokenizer
from ppow_jax.models.config import ModelConfig

__all__ = ["CONFIG", "SCALE", "tokenizer"]

SCALE = 0.15  # of the random weights: large enough that the next-token distribution is far from uniform

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=259,
    hidden_size=64,
    intermediate_size=128,
    num_layers=7,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    eos_token_ids=(258,),
)
