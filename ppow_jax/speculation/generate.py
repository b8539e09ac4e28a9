"""A whole generation as one XLA program: prefill, then rounds of propose -> verify -> accept -> commit.

A round commits 1..K+1 tokens per row. Plain autoregressive decoding is the same round with K = 0.

Invariants of a row with n = length committed tokens x_0..x_{n-1}: the target's cache holds positions < n-1; the last
token is the *root* of the next window. The drafter's cache holds indices < n-1-pending; `features` hold the target's
features of the last `pending` indices (those the last verification accepted), which the next round writes first.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from ppow_jax.models import cache, transformer
from ppow_jax.models import drafter as drafting
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import KV, Keys
from ppow_jax.models.transformer import Context
from ppow_jax.models.vocabulary import argmax
from ppow_jax.speculation.propose import Draft, propose
from ppow_jax.speculation.sampling import Sampling, draw
from ppow_jax.speculation.verify import Verdict, accept_greedy, accept_sampled

Array = jax.Array


@flax.struct.dataclass
class State:
    """Everything a generation carries, in fixed shapes; every leaf but none starts with the batch axis.

    tokens_BxL: prompt and output. prompt_B, length_B, limit_B: prompt length, committed tokens, and the length at
    which the row must stop. done_B. key_B: one PRNG key per row, so that a row's output does not depend on its
    neighbours. target_kv: per layer. drafter_kv, features_BxK1xF, pending_B: see the module. histogram_BxK1: how
    many verifications accepted k tokens.
    """

    tokens_BxL: Array
    prompt_B: Array
    length_B: Array
    limit_B: Array
    done_B: Array
    key_B: Array
    target_kv: tuple[KV, ...]
    drafter_kv: KV | None
    features_BxK1xF: Array | None
    pending_B: Array
    histogram_BxK1: Array


def cache_length(longest_prompt: int, max_new_tokens: int, K: int) -> int:
    """Slots that a generation needs: prompt, output, and room for one window past the last token."""
    return longest_prompt + max_new_tokens + K + 1


@functools.partial(jax.jit, static_argnames=("config", "K", "sampling", "L", "cache_dtype"))
def prefill(
    params: dict,
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
    cache_dtype=jnp.float32,
) -> State:
    """Reads right-padded prompts (each of at least one token) and commits the first new token.

    limit_B: total length (prompt and output) at which a row stops; at most L - K - 1.
    """
    B, P = prompt_BxP.shape
    position_BxP = jnp.broadcast_to(jnp.arange(P), (B, P))
    layers = drafter.config.feature_layers if drafter else ()
    out = transformer.forward(
        params, config, prompt_BxP, position_BxP, transformer.causal_mask(B, P), feature_layers=layers
    )
    last_Bx1 = (prompt_B - 1)[:, None]
    hidden_BxD = jnp.take_along_axis(out.hidden_BxSxD, last_Bx1[..., None], 1)[:, 0]
    first_B = _draw_rows(key_B, prompt_B, transformer.logits(params, hidden_BxD), sampling)

    tokens_BxL = jnp.pad(prompt_BxP, ((0, 0), (0, L - P)))
    state = State(
        tokens_BxL=tokens_BxL,
        prompt_B=prompt_B,
        length_B=prompt_B,
        limit_B=limit_B,
        done_B=prompt_B >= limit_B,
        key_B=key_B,
        target_kv=tuple(cache.grow(kv, L, cache_dtype) for kv in out.kv),
        drafter_kv=None,
        features_BxK1xF=None,
        pending_B=jnp.ones(B, jnp.int32),
        histogram_BxK1=jnp.zeros((B, K + 1), jnp.int32),
    )
    state = _commit_tokens(state, first_B[:, None], jnp.ones(B, jnp.int32), config)
    if drafter is None:
        return state
    g_BxPxE = drafting.fuse(drafter, out.features_BxSxF)
    following_BxP = jnp.concatenate([prompt_BxP[:, 1:], prompt_BxP[:, :1]], 1)
    embed_BxPxE = params["embed"][following_BxP].astype(jnp.float32)
    drafter_kv = cache.grow(drafting.prefix_keys(drafter, g_BxPxE, embed_BxPxE, position_BxP), L)
    last_feature_Bx1xF = jnp.take_along_axis(out.features_BxSxF, last_Bx1[..., None], 1)
    features_BxK1xF = jnp.pad(last_feature_Bx1xF, ((0, 0), (0, K), (0, 0)))
    return state.replace(drafter_kv=drafter_kv, features_BxK1xF=features_BxK1xF)


def _draw_rows(key_B, position_B, logits_BxV, sampling):
    keys = jax.vmap(jax.random.fold_in)(key_B, position_B)
    return jax.vmap(lambda k, x: draw(k, x, sampling))(keys, logits_BxV)


def _commit_tokens(state: State, token_BxS: Array, count_B: Array, config: ModelConfig) -> State:
    """Appends count_B tokens per row, cut at the first end token and at the row's limit; done rows stand still."""
    S = token_BxS.shape[1]
    is_end_BxS = functools.reduce(jnp.logical_or, [token_BxS == e for e in config.eos_token_ids], False)
    is_end_BxS = jnp.broadcast_to(is_end_BxS, token_BxS.shape)
    first_end_B = jnp.where(is_end_BxS.any(1), jnp.argmax(is_end_BxS, 1), S)
    count_B = jnp.minimum(jnp.minimum(count_B, first_end_B + 1), state.limit_B - state.length_B)
    count_B = jnp.where(state.done_B, 0, count_B)
    length_B = state.length_B + count_B
    ended_B = (first_end_B < count_B) | (length_B >= state.limit_B)
    tokens_BxL = cache.write_rows(state.tokens_BxL, token_BxS, state.length_B)
    return state.replace(tokens_BxL=tokens_BxL, length_B=length_B, done_B=state.done_B | ended_B)


def draft_window(params, drafter: Drafter, state: State, K: int, sampling: Sampling) -> tuple[State, Draft]:
    """Drafts K tokens after each row's root, and writes the features accepted last into the drafter's cache."""
    B, K1 = state.features_BxK1xF.shape[:2]
    start_B = state.length_B - 1 - state.pending_B
    index_BxK1 = start_B[:, None] + jnp.arange(K1)
    following_BxK1 = jnp.take_along_axis(state.tokens_BxL, index_BxK1 + 1, 1)
    g_BxK1xE = drafting.fuse(drafter, state.features_BxK1xF)
    embed_BxK1xE = params["embed"][following_BxK1].astype(jnp.float32)
    new = drafting.prefix_keys(drafter, g_BxK1xE, embed_BxK1xE, index_BxK1)

    last_Bx1 = (state.pending_B - 1)[:, None]
    g_Bx1xE = jnp.take_along_axis(g_BxK1xE, last_Bx1[..., None], 1)
    root_Bx1 = jnp.take_along_axis(following_BxK1, last_Bx1, 1)
    L = state.tokens_BxL.shape[1]
    prefix = [
        Keys(state.drafter_kv, cache.visible(L, start_B, 1)),
        Keys(new, cache.visible(K1, state.pending_B, 1)),
    ]
    key_B = jax.vmap(lambda k, n: jax.random.fold_in(jax.random.fold_in(k, n), 0))(state.key_B, state.length_B)
    anchor_Bx1 = state.length_B[:, None] - 2
    draft = propose(drafter, params["embed"], g_Bx1xE, root_Bx1, anchor_Bx1, prefix, K, sampling, key_B)
    start_B = cache.after(start_B, draft.token_BxMxK[:, 0, 0])
    return state.replace(drafter_kv=cache.write(state.drafter_kv, new, start_B)), draft


def verify_window(
    params,
    config: ModelConfig,
    drafter: Drafter | None,
    state: State,
    draft: Draft | None,
    sampling: Sampling,
) -> State:
    """Runs the target over root and draft, accepts, and commits tokens, keys and features."""
    B, L = state.tokens_BxL.shape
    root_B = state.length_B - 1
    window_BxK1 = jnp.take_along_axis(state.tokens_BxL, root_B[:, None], 1)
    if draft is not None:
        window_BxK1 = jnp.concatenate([window_BxK1, draft.token_BxMxK[:, 0]], 1)
    K1 = window_BxK1.shape[1]
    out = transformer.forward(
        params,
        config,
        window_BxK1,
        root_B[:, None] + jnp.arange(K1),
        transformer.causal_mask(B, K1),
        [Context(state.target_kv, cache.visible(L, root_B, K1))],
        drafter.config.feature_layers if drafter else (),
    )
    verdict = _accept(state, draft, transformer.logits(params, out.hidden_BxSxD), drafter, sampling)
    start_B = cache.after(root_B, verdict.token[:, 0])
    target_kv = tuple(
        cache.write(old, new, start_B) for old, new in zip(state.target_kv, out.kv, strict=True)
    )
    counted_B = jnp.where(state.done_B, 0, 1)[:, None]
    histogram_BxK1 = state.histogram_BxK1 + counted_B * jax.nn.one_hot(verdict.accepted, K1, dtype=jnp.int32)
    before_B = state.length_B
    state = _commit_tokens(state, verdict.token, verdict.accepted + 1, config)
    return state.replace(
        target_kv=target_kv,
        features_BxK1xF=out.features_BxSxF,
        pending_B=jnp.maximum(state.length_B - before_B, 1),
        histogram_BxK1=histogram_BxK1,
    )


def _accept(state: State, draft: Draft | None, logits_BxK1xV, drafter, sampling) -> Verdict:
    if draft is None:
        token_B = _draw_rows(state.key_B, state.length_B, logits_BxK1xV[:, 0], sampling)
        return Verdict(jnp.zeros_like(token_B), token_B[:, None])
    if sampling.greedy:
        return accept_greedy(draft.token_BxMxK[:, 0], argmax(logits_BxK1xV))
    keys = jax.vmap(lambda k, n: jax.random.fold_in(jax.random.fold_in(k, n), 1))(state.key_B, state.length_B)
    rule = functools.partial(accept_sampled, sampling=sampling)
    return jax.vmap(rule, in_axes=(0, 0, 0, 0, None, 0))(
        keys,
        draft.token_BxMxK[:, 0],
        draft.id_BxMxK[:, 0],
        draft.logits_BxMxKxW[:, 0],
        drafter.target_ids_W,
        logits_BxK1xV,
    )


@functools.partial(jax.jit, static_argnames=("config", "K", "sampling"), donate_argnames=("state",))
def decode(
    params: dict,
    config: ModelConfig,
    drafter: Drafter | None,
    state: State,
    rounds: Array | int,
    *,
    K: int,
    sampling: Sampling,
) -> State:
    """Rounds until every row is done, or `rounds` of them. K = 0 is plain autoregressive decoding."""

    def unfinished(carry):
        step, state = carry
        return (step < rounds) & ~state.done_B.all()

    def one_round(carry):
        step, state = carry
        draft = None
        if K:
            state, draft = draft_window(params, drafter, state, K, sampling)
        return step + 1, verify_window(params, config, drafter if K else None, state, draft, sampling)

    return jax.lax.while_loop(unfinished, one_round, (0, state))[1]
