"""Prefill: reads prompts, the first of the two programs of a generation."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ppow_jax import sharding
from ppow_jax.models import cache, stack, transformer
from ppow_jax.models import drafter as drafting
from ppow_jax.models.attention_backends import Packed
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.models.layers import KV
from ppow_jax.models.stack import StackedKV
from ppow_jax.models.transformer import Context
from ppow_jax.speculation.sampling import Sampling, draw
from ppow_jax.speculation.state import State, commit_tokens, usable

Array = jax.Array
WHOLE, PIECE = 512, 256  # tokens: longest prompt read in one pass, and the chunk size for longer ones


@functools.partial(jax.jit, static_argnames=("config", "K", "L", "cache_dtype"))
def prefill(
    params: dict[str, Any],
    config: ModelConfig,
    drafter: Drafter | None,
    prompt_BxP: Array,
    prompt_B: Array,
    limit_B: Array,
    key_B: Array,
    *,
    K: int,
    sampling: Sampling,
    L: int,
    cache_dtype: DTypeLike | None = None,
) -> State:
    """Reads right-padded prompts (each of at least one token) and commits the first new token.

    limit_B: total length (prompt and output) at which a row stops; at most L - K - 1. cache_dtype: of the target's
    cache, by default that of the precision policy. Where P is more than WHOLE, prompts are read in chunks of PIECE
    tokens, each attending to the cache of those before, up to the longest's end.
    """
    B, P = prompt_BxP.shape
    S = P if P <= WHOLE else PIECE
    pieces = -(-P // S)
    padded_BxP1 = jnp.pad(prompt_BxP, ((0, 0), (0, pieces * S + 1 - P)))
    read = functools.partial(_read, params, config, drafter, padded_BxP1, prompt_B - 1, S)
    prompt = _unread(params, config, drafter, B, pieces * S, cache_dtype)
    if pieces == 1:
        prompt = read(0, prompt)
    else:
        prompt = jax.lax.fori_loop(0, -(-prompt_B.max() // S), read, prompt)
    logits_BxV = transformer.logits(params, prompt.hidden_BxD)
    first_B = _draw_rows(key_B, prompt_B, logits_BxV, sampling)
    healthy_B = usable(logits_BxV)

    state = State.begin(
        jnp.pad(prompt_BxP, ((0, 0), (0, L - P))),
        prompt_B=prompt_B,
        limit_B=limit_B,
        key_B=key_B,
        healthy_B=healthy_B,
        target_kv=stack.each_layer(functools.partial(_fit, L=L), prompt.target_kv),
        K=K,
        experts=config.experts is not None,
    )
    state = commit_tokens(state, first_B[:, None], jnp.ones(B, jnp.int32), config)
    if drafter is not None:
        features_BxK1xF = jnp.pad(prompt.features_BxF[:, None], ((0, 0), (0, K), (0, 0)))
        drafter_kv = tuple(_fit(kv, L) for kv in prompt.drafter_kv)
        state = state.replace(drafter_kv=drafter_kv, features_BxK1xF=features_BxK1xF)
    return sharding.constrain(state)


class Prompt(NamedTuple):
    """Caches and last states of prompts, as far as they have been read.

    target_kv: caches, per run of layers (`models.stack`). drafter_kv: caches per layer. hidden_BxD, features_BxF: those
    of each row's last token, once that has been read.
    """

    target_kv: tuple[KV | StackedKV, ...]
    drafter_kv: tuple[KV, ...] | None
    hidden_BxD: Array
    features_BxF: Array | None


def _unread(
    params: dict[str, Any], config: ModelConfig, drafter: Drafter | None, B: int, P: int, cache_dtype: DTypeLike | None
) -> Prompt:
    dtype, cache_dtype = transformer.activation(params), cache_dtype or transformer.cache_dtype(params)
    empty = cache.empty(B, config.num_kv_heads, P, config.head_dim, cache_dtype)
    target_kv = stack.like(params["layers"], empty)
    hidden_BxD = jnp.zeros((B, config.hidden_size), dtype)
    if drafter is None:
        return Prompt(target_kv, None, hidden_BxD, None)
    drafter_kv = drafting.empty_cache(drafter, B, P)
    return Prompt(target_kv, drafter_kv, hidden_BxD, jnp.zeros((B, 3 * config.hidden_size), dtype))


def _read(
    params: dict[str, Any],
    config: ModelConfig,
    drafter: Drafter | None,
    tokens_BxP1: Array,
    last_B: Array,
    S: int,
    piece: Array | int,
    prompt: Prompt,
) -> Prompt:
    """Reads tokens piece * S .. piece * S + S - 1 of every row; positions after a row's last token have no effect."""
    B, P = tokens_BxP1.shape[0], tokens_BxP1.shape[1] - 1
    start = piece * S
    start_B = jnp.full(B, start)
    position_BxS = start + jnp.broadcast_to(jnp.arange(S), (B, S))
    tokens_BxS1 = jax.lax.dynamic_slice_in_dim(tokens_BxP1, start, S + 1, 1)
    contexts = [Context(prompt.target_kv, cache.visible(P, start_B, S), jnp.arange(P))] if S < P else []
    layers = drafter.config.feature_layers if drafter else ()
    out = transformer.forward(params, config, tokens_BxS1[:, :S], position_BxS, Packed(), contexts, layers)
    target_kv = stack.each_layer(functools.partial(cache.write, start_B=start_B), prompt.target_kv, out.kv)
    index_Bx1 = jnp.clip(last_B - start, 0, S - 1)[:, None]
    here_Bx1 = (last_B // S == piece)[:, None]

    def last(x_BxSxF: Array, before_BxF: Array) -> Array:
        return jnp.where(here_Bx1, jnp.take_along_axis(x_BxSxF, index_Bx1[..., None], 1)[:, 0], before_BxF)

    hidden_BxD = last(out.hidden_BxSxD, prompt.hidden_BxD)
    if drafter is None:
        return Prompt(target_kv, None, hidden_BxD, None)
    g_BxSxE = drafting.fuse(drafter, out.features_BxSxF)
    embed_BxSxE = drafter.embed(params["embed"], tokens_BxS1[:, 1:])
    earlier = [Prefix(prompt.drafter_kv, cache.visible(P, start_B, S))] if S < P else []
    new = drafting.prefix_keys(drafter, g_BxSxE, embed_BxSxE, position_BxS, transformer.causal_mask(B, S), earlier)
    drafter_kv = tuple(cache.write(old, new, start_B) for old, new in zip(prompt.drafter_kv, new, strict=True))
    return Prompt(target_kv, drafter_kv, hidden_BxD, last(out.features_BxSxF, prompt.features_BxF))


def _fit(kv: KV, L: int) -> KV:
    """Resizes a prompt's cache to length L; slots beyond L hold only padding."""
    return cache.grow(KV(kv.k_BxKvxdxL[..., :L], kv.v_BxKvxLxd[:, :, :L]), L, kv.v_BxKvxLxd.dtype)


def _draw_rows(key_B: Array, position_B: Array, logits_BxV: Array, sampling: Sampling) -> Array:
    keys = jax.vmap(jax.random.fold_in)(key_B, position_B)
    return draw(keys, logits_BxV, sampling)[0]
