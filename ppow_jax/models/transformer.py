"""The frozen target: a decoder-only transformer as pure functions of (parameters, tokens, visible keys)."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.config import ModelConfig
from ppow_jax.models.layers import KV, Keys, attention, heads, linear, rms_norm, rope, rotation, rows_of, swiglu

Array = jax.Array


class Outputs(NamedTuple):
    """What a forward pass gives for S new tokens.

    hidden_BxSxD: the final hidden state, normed (input of the head). features_BxSxF: the hidden states that
    enter the chosen layers, side by side (F = 3 * D). kv: per layer, the new tokens' keys and values.
    """

    hidden_BxSxD: Array
    features_BxSxF: Array | None
    kv: tuple[KV, ...]


class Context(NamedTuple):
    """Keys of earlier tokens: per layer a `KV` of length L, and mask_BxSxL of what each new token sees."""

    kv: Sequence[KV]
    mask_BxSxL: Array


def forward(
    params: dict,
    config: ModelConfig,
    tokens_BxS: Array,
    position_BxS: Array,
    self_mask_BxSxS: Array,
    contexts: Sequence[Context] = (),
    feature_layers: Sequence[int] = (),
) -> Outputs:
    """Runs the target over S new tokens that see the contexts and, through self_mask, each other.

    self_mask_BxSxS: a new token may see itself and earlier ones of the S, never later ones.
    feature_layers: indices in the "input of layer" convention (N = the output of the last layer, before the
    norm). The pass writes nothing: the caller decides which of the returned keys to keep.
    """
    x_BxSxD = rows_of(params["embed"], tokens_BxS)
    rotary = rotation(position_BxS, config.head_dim, config.rope_theta)
    features, kv = {}, []
    for n, layer in enumerate(params["layers"]):
        features[n] = x_BxSxD
        blocks = [Keys(context.kv[n], context.mask_BxSxL) for context in contexts]
        with jax.named_scope(f"layer_{n}"):
            x_BxSxD, new_kv = decoder_layer(layer, config, x_BxSxD, rotary, self_mask_BxSxS, blocks)
        kv.append(new_kv)
    features[config.num_layers] = x_BxSxD
    chosen = jnp.concatenate([features[n] for n in feature_layers], -1) if feature_layers else None
    return Outputs(rms_norm(x_BxSxD, params["norm"], config.rms_norm_eps), chosen, tuple(kv))


def decoder_layer(
    layer: dict,
    config: ModelConfig,
    x_BxSxD: Array,
    rotary: tuple[Array, Array],
    self_mask_BxSxS: Array,
    blocks: Sequence[Keys],
) -> tuple[Array, KV]:
    """One layer's parameters applied to the residual stream: (x_BxSxD, the new tokens' keys and values).

    rotary: see `layers.rotation`. blocks: this layer's keys of earlier tokens. Nothing depends on which layer it is.
    """
    attended_BxSxD, new_kv = _attend(layer, config, x_BxSxD, rotary, self_mask_BxSxS, blocks)
    x_BxSxD += attended_BxSxD
    h_BxSxD = rms_norm(x_BxSxD, layer["post_norm"], config.rms_norm_eps)
    return x_BxSxD + swiglu(h_BxSxD, layer["gate_proj"], layer["up_proj"], layer["down_proj"]), new_kv


def _attend(layer, config, x_BxSxD, rotary, self_mask_BxSxS, blocks):
    h_BxSxD = rms_norm(x_BxSxD, layer["input_norm"], config.rms_norm_eps)
    q = rope(heads(linear(h_BxSxD, layer["q_proj"]), config.head_dim), rotary)
    k = rope(heads(linear(h_BxSxD, layer["k_proj"]), config.head_dim), rotary)
    v = heads(linear(h_BxSxD, layer["v_proj"]), config.head_dim)
    new = KV.of(k, v)
    out_BxSxHxd = attention(q, blocks, Keys(new, self_mask_BxSxS))
    return linear(out_BxSxHxd.reshape(*x_BxSxD.shape[:2], -1), layer["o_proj"]), new


def head(params: dict) -> Array:
    """The output matrix [V, D]: the embedding itself where the two are tied."""
    return params.get("lm_head", params["embed"])


def logits(params: dict, hidden: Array) -> Array:
    """Target logits [..., V], float32, of normed hidden states [..., D]."""
    return linear(hidden, head(params))


def causal_mask(B: int, S: int) -> Array:
    """[B, S, S], True where key <= query."""
    return jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))


def init(key: Array, config: ModelConfig, dtype=jnp.float32, scale: float = 0.02) -> dict:
    """Random parameters (for tests and the tiny target)."""
    D, d, intermediate = config.hidden_size, config.head_dim, config.intermediate_size
    keys = iter(jax.random.split(key, 8 * config.num_layers + 2))

    def matrix(*shape):
        return (jax.random.normal(next(keys), shape) * scale).astype(dtype)

    def layer():
        return {
            "input_norm": jnp.ones(D, dtype),
            "q_proj": matrix(config.num_heads * d, D),
            "k_proj": matrix(config.num_kv_heads * d, D),
            "v_proj": matrix(config.num_kv_heads * d, D),
            "o_proj": matrix(D, config.num_heads * d),
            "post_norm": jnp.ones(D, dtype),
            "gate_proj": matrix(intermediate, D),
            "up_proj": matrix(intermediate, D),
            "down_proj": matrix(D, intermediate),
        }

    params = {
        "embed": matrix(config.vocab_size, D),
        "layers": [layer() for _ in range(config.num_layers)],
        "norm": jnp.ones(D, dtype),
    }
    return params if config.tie_word_embeddings else params | {"lm_head": matrix(config.vocab_size, D)}
