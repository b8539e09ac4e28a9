"""The frozen target: a decoder-only transformer as pure functions of (parameters, tokens, visible keys).

Llama and Qwen, dense and with experts, share this code: the parameters of a layer determine what it computes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ppow_jax import sharding
from ppow_jax.models import attention_backends, precision, stack
from ppow_jax.models.attention_backends import Packed
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.experts import route, spread_mixture
from ppow_jax.models.layers import KV, Keys, attention, biased, heads, linear, rms_norm, rope, rotation, rows_of
from ppow_jax.models.stack import Run, StackedKV

Array = jax.Array


class Outputs(NamedTuple):
    """Outputs of a forward pass over S new tokens.

    hidden_BxSxD: the final hidden state, normed (input of the head). features_BxSxF: the hidden states that
    enter the chosen layers, concatenated (F = 3 * D). kv: the new tokens' keys and values, of each run of layers.
    experts: for each layer with experts, the experts of each token, [B, S, experts per token].
    """

    hidden_BxSxD: Array
    features_BxSxF: Array | None
    kv: tuple[KV | StackedKV, ...]
    experts: tuple[Array, ...] = ()


class Context(NamedTuple):
    """Keys of earlier tokens: per run of layers a `KV` of length L, and mask_BxSxL of visible keys.

    position_BxL: positions of those tokens (or [L], or [1, L], shared by all rows); needed for sliding windows only.
    """

    kv: Sequence[KV | StackedKV]
    mask_BxSxL: Array
    position_BxL: Array | None = None


def forward(
    params: dict[str, Any],
    config: ModelConfig,
    tokens_BxS: Array,
    position_BxS: Array,
    self_mask_BxSxS: Array | Packed,
    contexts: Sequence[Context] = (),
    feature_layers: Sequence[int] = (),
) -> Outputs:
    """Runs the target over S new tokens that attend to the contexts and, through self_mask, to each other.

    params: layers separate or stacked (`models.stack`), with the same results. self_mask_BxSxS: a new token may attend
    to itself and earlier ones of the S, never to later ones; as `Packed` a library's kernel may compute the attention.
    Sliding windows restrict the masks further.
    feature_layers: indices in the "input of layer" convention (N = the output of the last layer, before the norm). The
    pass is pure: the caller decides which of the returned keys to keep.
    """
    x_BxSxD = rows_of(params["embed"], tokens_BxS).astype(activation(params))
    own_BxSxS: Any = self_mask_BxSxS
    if isinstance(self_mask_BxSxS, Packed) and not _by_a_library(params, config, tokens_BxS, contexts):
        own_BxSxS = self_mask_BxSxS.dense(*tokens_BxS.shape)
    rotary = rotation(position_BxS, config.head_dim, config.rope_theta, config.rope_scaling)
    masks = own_BxSxS, [context.mask_BxSxL for context in contexts]
    sliding_masks = masks
    if config.sliding_layers:
        sliding_masks = (
            own_BxSxS & _near(config, position_BxS, position_BxS),
            [c.mask_BxSxL & _near(config, position_BxS, c.position_BxL) for c in contexts],
        )

    def applied(run: Run) -> Callable[..., LayerOutputs]:
        """(parameters, x_BxSxD, KVs of the contexts) -> outputs of a layer; the run's layers share masks."""
        own_mask, context_masks = masks if config.window(run.begin) is None else sliding_masks

        def one(layer: dict[str, Any], x_BxSxD: Array, context_kv: Sequence[KV]) -> LayerOutputs:
            blocks = [Keys(kv, mask) for kv, mask in zip(context_kv, context_masks, strict=True)]
            return decoder_layer(layer, config, x_BxSxD, rotary, own_mask, blocks)

        return one

    features: dict[int, Array] = {}
    new: list[KV | StackedKV] = []
    experts: list[Array] = []
    for r, run in enumerate(stack.runs(params["layers"])):
        context_kv = [context.kv[r] for context in contexts]
        if run.stacked:
            x_BxSxD, entered, (kv, chosen_NxBxSxX) = stack.scan(applied(run), run, x_BxSxD, context_kv, feature_layers)
            features |= entered
            new.append(StackedKV(*kv))
            experts += [] if chosen_NxBxSxX is None else list(chosen_NxBxSxX)
            continue
        features[run.begin] = x_BxSxD
        with jax.named_scope(f"layer_{run.begin}"):
            x_BxSxD, new_kv, chosen_BxSxX = applied(run)(run.params, x_BxSxD, context_kv)
        new.append(new_kv)
        experts += [] if chosen_BxSxX is None else [chosen_BxSxX]
    features[config.num_layers] = x_BxSxD
    chosen = jnp.concatenate([features[n] for n in feature_layers], -1) if feature_layers else None
    return Outputs(rms_norm(x_BxSxD, params["norm"], config.rms_norm_eps), chosen, tuple(new), tuple(experts))


def _by_a_library(params: dict[str, Any], config: ModelConfig, tokens_BxS: Array, contexts: Sequence[Context]) -> bool:
    fits = attention_backends.eligible(tokens_BxS.shape[1], config.head_dim, activation(params))
    return fits and not contexts and not config.sliding_layers


def activation(params: dict[str, Any]) -> Any:
    """Dtype of a target's activations: of the residual stream, features and hidden states."""
    return precision.current().activation(params["embed"].dtype)


def cache_dtype(params: dict[str, Any]) -> Any:
    """Dtype of a target's caches."""
    return precision.current().keys(params["embed"].dtype)


def _near(config: ModelConfig, position_BxS: Array, position_BxL: Array | None) -> Array:
    """[B, S, L]: True where a query's sliding window reaches back to a key."""
    if position_BxL is None:
        raise ValueError("a target with sliding windows needs the positions of every context")
    distance_BxSxL = position_BxS[..., None] - jnp.atleast_2d(position_BxL)[:, None]
    return distance_BxSxL < config.sliding_window


class LayerOutputs(NamedTuple):
    """The residual stream after a layer, the new tokens' keys and values, and, with experts, those of each token."""

    x_BxSxD: Array
    kv: KV
    experts_BxSxX: Array | None


@functools.partial(jax.jit, static_argnames=("config",))  # equal layers are traced and lowered once
def decoder_layer(
    layer: dict[str, Any],
    config: ModelConfig,
    x_BxSxD: Array,
    rotary: tuple[Array, Array],
    self_mask_BxSxS: Array,
    blocks: Sequence[Keys],
) -> LayerOutputs:
    """Applies one layer's parameters to the residual stream.

    rotary: see `layers.rotation`. blocks: this layer's keys of earlier tokens, with this layer's masks. The code is
    independent of the layer's index.
    """
    attended_BxSxD, kv = _attend(layer, config, x_BxSxD, rotary, self_mask_BxSxS, blocks)
    x_BxSxD += attended_BxSxD
    h_BxSxD = rms_norm(x_BxSxD, layer["post_norm"], config.rms_norm_eps)
    if "router" not in layer:
        gate, up = jax.nn.silu(biased(h_BxSxD, layer, "gate")), biased(h_BxSxD, layer, "up")
        return LayerOutputs(x_BxSxD + biased(gate * up, layer, "down"), kv, None)
    h_MxD = h_BxSxD.reshape(-1, h_BxSxD.shape[-1])
    with jax.named_scope("experts"):
        routes = route(h_MxD, layer["router"], config.experts)
        x_BxSxD += spread_mixture(layer, h_MxD, routes).reshape(x_BxSxD.shape).astype(x_BxSxD.dtype)
    return LayerOutputs(x_BxSxD, kv, routes.expert_MxX.reshape(*x_BxSxD.shape[:2], -1))


def _attend(
    layer: dict[str, Any], config: ModelConfig, x_BxSxD: Array, rotary: tuple[Array, Array], self_mask_BxSxS: Any,
    blocks: Sequence[Keys],
) -> tuple[Array, KV]:
    h_BxSxD = rms_norm(x_BxSxD, layer["input_norm"], config.rms_norm_eps)
    q, k, v = (heads(biased(h_BxSxD, layer, name), config.head_dim) for name in "qkv")
    if config.qk_norm:
        q, k = (rms_norm(x, layer[f"{name}_norm"], config.rms_norm_eps) for name, x in (("q", q), ("k", k)))
    q, new = rope(q, rotary), KV.of(rope(k, rotary), v)
    out_BxSxHxd = attention(q, blocks, Keys(new, self_mask_BxSxS))
    return biased(out_BxSxHxd.reshape(*x_BxSxD.shape[:2], -1), layer, "o"), new


def head(params: dict[str, Any]) -> Array:
    """The output matrix [V, D]: the embedding itself where the two are tied."""
    return params.get("lm_head", params["embed"])


def logits(params: dict[str, Any], hidden: Array, whole: bool = True) -> Array:
    """Target logits [..., V], float32, of normed hidden states [B, ..., D].

    whole: along V on every device; False leaves each device its part of V, which is enough for a maximum.
    """
    place = sharding.whole_logits if whole else sharding.split_logits
    return place(linear(hidden, head(params)))


def causal_mask(B: int, S: int) -> Array:
    """[B, S, S], True where key <= query."""
    return jnp.broadcast_to(jnp.tril(jnp.ones((S, S), bool)), (B, S, S))


def shapes(config: ModelConfig) -> dict[str, Any]:
    """Shape of every parameter, in the structure of the parameters themselves."""
    D, V, q, kv = config.hidden_size, config.vocab_size, config.num_heads, config.num_kv_heads
    q, kv = q * config.head_dim, kv * config.head_dim

    def layer(n: int) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"input_norm": (D,), "q_proj": (q, D), "k_proj": (kv, D), "v_proj": (kv, D)}
        found |= {"o_proj": (D, q), "post_norm": (D,)}
        if config.experts and n in config.experts.layers:
            E, I = config.experts.number, config.experts.intermediate_size
            found |= {"router": (E, D), "gate_proj": (E, I, D), "up_proj": (E, I, D), "down_proj": (E, D, I)}
        else:
            I = config.intermediate_size
            found |= {"gate_proj": (I, D), "up_proj": (I, D), "down_proj": (D, I)}
        biases = ["q", "k", "v"] * config.qkv_bias + ["o"] * config.o_bias + ["gate", "up", "down"] * config.mlp_bias
        found |= {f"{name}_bias": found[f"{name}_proj"][:1] for name in biases}
        return found | ({"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)} if config.qk_norm else {})

    result = {"embed": (V, D), "layers": [layer(n) for n in range(config.num_layers)], "norm": (D,)}
    return result if config.tie_word_embeddings else result | {"lm_head": (V, D)}


def init(key: Array, config: ModelConfig, dtype: DTypeLike = jnp.float32, scale: float = 0.02) -> dict[str, Any]:
    """Random parameters (for tests and the tiny target). Norms are 1; biases are random, so that they matter."""
    keys = iter(jax.random.split(key, 8 * config.num_layers + 2))
    bias_keys = iter(jax.random.split(jax.random.fold_in(key, 1), 7 * config.num_layers))

    def value(name: str, shape: tuple[int, ...]) -> Array:
        if name.endswith("norm"):
            return jnp.ones(shape, dtype)
        random = jax.random.normal(next(bias_keys if name.endswith("bias") else keys), shape)
        return (random * scale).astype(dtype)

    def values(shapes: dict[str, Any]) -> dict[str, Any]:
        return {
            name: [values(layer) for layer in x] if name == "layers" else value(name, x) for name, x in shapes.items()
        }

    return values(shapes(config))
