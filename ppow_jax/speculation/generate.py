"""A whole generation as one XLA program: prefill, then rounds of propose -> verify -> accept -> commit.

A round commits 1..K+1 tokens per row, whether it drafts a chain or a tree. Plain autoregressive decoding is the same
round with K = 0.

Invariants of a row with n = length committed tokens x_0..x_{n-1}: the target's cache holds positions < n-1; the last
token is the *root* of the next window. The drafter's cache holds indices < n-1-pending; `features` hold the target's
features of the last `pending` indices (those the last verification accepted), which the next round writes first.
"""

import functools
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from ppow_jax.models import cache, transformer
from ppow_jax.models import drafter as drafting
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import KV, Keys, rows_of
from ppow_jax.models.transformer import Context
from ppow_jax.models.vocabulary import argmax
from ppow_jax.speculation.adaptive import Pace, update, worth_going_on
from ppow_jax.speculation.propose import NONE, Draft, propose
from ppow_jax.speculation.sampling import Sampling, draw, log_distribution, sample
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.tree import Tree, children_drawn, compact, follow, propose_tree, remainder
from ppow_jax.speculation.verify import accept_greedy, accept_sampled, block_wise, emitted, token_wise

Array = jax.Array


class State(flax.struct.PyTreeNode):
    """Everything a generation carries, in fixed shapes; every leaf but none starts with the batch axis.

    tokens_BxL: prompt and output. prompt_B, length_B, limit_B: prompt length, committed tokens, and the length at
    which the row must stop. done_B. key_B: one PRNG key per row, so that a row's output does not depend on its
    neighbours. healthy_B: whether the target's logits have been usable, see `_usable`; a row stops where they are not.
    target_kv: per layer. drafter_kv, features_BxK1xF, pending_B: see the module. histogram_BxK1: how
    many verifications accepted k tokens. drafted_B: tokens that were drafted. pace: see `speculation.adaptive`.
    """

    tokens_BxL: Array
    prompt_B: Array
    length_B: Array
    limit_B: Array
    done_B: Array
    key_B: Array
    healthy_B: Array
    target_kv: tuple[KV, ...]
    drafter_kv: KV | None
    features_BxK1xF: Array | None
    pending_B: Array
    histogram_BxK1: Array
    drafted_B: Array
    pace: Pace


WHOLE, PIECE = 512, 256  # tokens: the longest prompt that is read in one piece, and the pieces of longer ones


def cache_length(longest_prompt: int, max_new_tokens: int, K: int) -> int:
    """Slots that a generation needs: prompt, output, and room for one window past the last token."""
    return longest_prompt + max_new_tokens + K + 1


@functools.partial(jax.jit, static_argnames=("config", "K", "L", "cache_dtype"))
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

    limit_B: total length (prompt and output) at which a row stops; at most L - K - 1. Where P is more than WHOLE,
    prompts are read PIECE tokens at a time, each piece seeing the cache of those before, up to the longest one's end.
    """
    B, P = prompt_BxP.shape
    S = P if P <= WHOLE else PIECE
    pieces = -(-P // S)
    padded_BxP1 = jnp.pad(prompt_BxP, ((0, 0), (0, pieces * S + 1 - P)))
    read = functools.partial(_read, params, config, drafter, padded_BxP1, prompt_B - 1, S)
    prompt = _unread(config, drafter, B, pieces * S, cache_dtype)
    if pieces == 1:
        prompt = read(0, prompt)
    else:
        prompt = jax.lax.fori_loop(0, -(-prompt_B.max() // S), read, prompt)
    logits_BxV = transformer.logits(params, prompt.hidden_BxD)
    first_B = _draw_rows(key_B, prompt_B, logits_BxV, sampling)
    healthy_B = _usable(logits_BxV)

    state = State(
        tokens_BxL=jnp.pad(prompt_BxP, ((0, 0), (0, L - P))),
        prompt_B=prompt_B,
        length_B=prompt_B,
        limit_B=limit_B,
        done_B=(prompt_B >= limit_B) | ~healthy_B,
        key_B=key_B,
        healthy_B=healthy_B,
        target_kv=tuple(_fit(kv, L) for kv in prompt.target_kv),
        drafter_kv=None,
        features_BxK1xF=None,
        pending_B=jnp.ones(B, jnp.int32),
        histogram_BxK1=jnp.zeros((B, K + 1), jnp.int32),
        drafted_B=jnp.zeros(B, jnp.int32),
        pace=Pace.start(B),
    )
    state = _commit_tokens(state, first_B[:, None], jnp.ones(B, jnp.int32), config)
    if drafter is None:
        return state
    features_BxK1xF = jnp.pad(prompt.features_BxF[:, None], ((0, 0), (0, K), (0, 0)))
    return state.replace(drafter_kv=_fit(prompt.drafter_kv, L), features_BxK1xF=features_BxK1xF)


class Prompt(NamedTuple):
    """What prompts have left behind, as far as they are read.

    target_kv (per layer), drafter_kv: caches. hidden_BxD, features_BxF: of each row's last token, once that is read.
    """

    target_kv: tuple[KV, ...]
    drafter_kv: KV | None
    hidden_BxD: Array
    features_BxF: Array | None


def _unread(config: ModelConfig, drafter: Drafter | None, B: int, P: int, cache_dtype) -> Prompt:
    target_kv = tuple(
        cache.empty(B, config.num_kv_heads, P, config.head_dim, cache_dtype) for _ in range(config.num_layers)
    )
    hidden_BxD = jnp.zeros((B, config.hidden_size))
    if drafter is None:
        return Prompt(target_kv, None, hidden_BxD, None)
    drafter_kv = cache.empty(B, drafter.config.num_kv_heads, P, drafter.config.head_dim)
    return Prompt(target_kv, drafter_kv, hidden_BxD, jnp.zeros((B, 3 * config.hidden_size)))


def _read(
    params,
    config: ModelConfig,
    drafter: Drafter | None,
    tokens_BxP1: Array,
    last_B: Array,
    S: int,
    piece: Array | int,
    prompt: Prompt,
) -> Prompt:
    """Reads tokens piece * S .. piece * S + S - 1 of every row; what comes after a row's last one never counts."""
    B, P = tokens_BxP1.shape[0], tokens_BxP1.shape[1] - 1
    start = piece * S
    start_B = jnp.full(B, start)
    position_BxS = start + jnp.broadcast_to(jnp.arange(S), (B, S))
    tokens_BxS1 = jax.lax.dynamic_slice_in_dim(tokens_BxP1, start, S + 1, 1)
    contexts = [Context(prompt.target_kv, cache.visible(P, start_B, S), jnp.arange(P))] if S < P else []
    layers = drafter.config.feature_layers if drafter else ()
    out = transformer.forward(
        params, config, tokens_BxS1[:, :S], position_BxS, transformer.causal_mask(B, S), contexts, layers
    )
    target_kv = tuple(cache.write(old, new, start_B) for old, new in zip(prompt.target_kv, out.kv, strict=True))
    index_Bx1 = jnp.clip(last_B - start, 0, S - 1)[:, None]
    here_Bx1 = (last_B // S == piece)[:, None]

    def last(x_BxSxF, before_BxF):
        return jnp.where(here_Bx1, jnp.take_along_axis(x_BxSxF, index_Bx1[..., None], 1)[:, 0], before_BxF)

    hidden_BxD = last(out.hidden_BxSxD, prompt.hidden_BxD)
    if drafter is None:
        return Prompt(target_kv, None, hidden_BxD, None)
    g_BxSxE = drafting.fuse(drafter, out.features_BxSxF)
    embed_BxSxE = params["embed"][tokens_BxS1[:, 1:]].astype(jnp.float32)
    new = drafting.prefix_keys(drafter, g_BxSxE, embed_BxSxE, position_BxS)
    drafter_kv = cache.write(prompt.drafter_kv, new, start_B)
    return Prompt(target_kv, drafter_kv, hidden_BxD, last(out.features_BxSxF, prompt.features_BxF))


def _fit(kv: KV, L: int) -> KV:
    """A prompt's cache as one of length L; slots beyond L hold padding alone."""
    return cache.grow(KV(kv.k_BxKvxdxL[..., :L], kv.v_BxKvxLxd[:, :, :L]), L, kv.v_BxKvxLxd.dtype)


def _usable(logits: Array) -> Array:
    """Whether logits [..., V] give a distribution: no NaN, and a finite maximum, which the argmax needs anyway."""
    return jnp.isfinite(logits.max(-1))


def _draw_rows(key_B, position_B, logits_BxV, sampling):
    keys = jax.vmap(jax.random.fold_in)(key_B, position_B)
    return draw(keys, logits_BxV, sampling)[0]


def _commit_tokens(state: State, token_BxS: Array, count_B: Array, config: ModelConfig) -> State:
    """Appends count_B tokens per row, cut at the first end token and at the row's limit; done rows stand still."""
    S = token_BxS.shape[1]
    is_end_BxS = jnp.isin(token_BxS, jnp.asarray(config.eos_token_ids, jnp.int32))
    first_end_B = jnp.where(is_end_BxS.any(1), jnp.argmax(is_end_BxS, 1), S)
    count_B = jnp.minimum(jnp.minimum(count_B, first_end_B + 1), state.limit_B - state.length_B)
    count_B = jnp.where(state.done_B, 0, count_B)
    length_B = state.length_B + count_B
    ended_B = (first_end_B < count_B) | (length_B >= state.limit_B)
    tokens_BxL = cache.write_rows(state.tokens_BxL, token_BxS, state.length_B)
    return state.replace(tokens_BxL=tokens_BxL, length_B=length_B, done_B=state.done_B | ended_B)


class Window(NamedTuple):
    """What one round verifies: the root and N drafted tokens, parents first.

    token_BxN1, depth_BxN1 (0 for the root), seen_BxN1xN1: each index's ancestors and itself.
    """

    token_BxN1: Array
    depth_BxN1: Array
    seen_BxN1xN1: Array


class Round(NamedTuple):
    """What the target made of a window.

    accepted_B. token_BxK1: the accepted tokens, then the target's own, then padding. hidden_BxN1xD: what judged each
    index. features_BxK1xF, kv: of the root and the accepted path, in its order, then padding. index_BxK1: their window
    indices. healthy_B: whether all the target's logits were usable.
    """

    accepted_B: Array
    token_BxK1: Array
    hidden_BxN1xD: Array
    features_BxK1xF: Array | None
    kv: tuple[KV, ...]
    index_BxK1: Array
    healthy_B: Array


def draft_window(
    params, drafter: Drafter, state: State, speculation: Speculation, sampling: Sampling, cost_K1: Array | None = None
) -> tuple[State, Draft | Tree]:
    """Drafts after each row's root, and writes the features accepted last into the drafter's cache.

    cost_K1: of a round that drafts 0..K tokens, in steps of plain decoding; needed for an adaptive window.
    """
    B, K1 = state.features_BxK1xF.shape[:2]
    start_B = state.length_B - 1 - state.pending_B
    index_BxK1 = start_B[:, None] + jnp.arange(K1)
    following_BxK1 = jnp.take_along_axis(state.tokens_BxL, index_BxK1 + 1, 1)
    g_BxK1xE = drafting.fuse(drafter, state.features_BxK1xF)
    embed_BxK1xE = rows_of(params["embed"], following_BxK1)
    new = drafting.prefix_keys(drafter, g_BxK1xE, embed_BxK1xE, index_BxK1)

    last_Bx1 = (state.pending_B - 1)[:, None]
    g_Bx1xE = jnp.take_along_axis(g_BxK1xE, last_Bx1[..., None], 1)
    root_Bx1 = jnp.take_along_axis(following_BxK1, last_Bx1, 1)
    L = state.tokens_BxL.shape[1]
    prefix = [
        Keys(state.drafter_kv, cache.visible(L, start_B, 1)),
        Keys(new, cache.visible(K1, state.pending_B, 1)),
    ]
    anchor_Bx1 = state.length_B[:, None] - 2
    anchored = drafter, params["embed"], g_Bx1xE, root_Bx1, anchor_Bx1, prefix
    draft: Draft | Tree
    if speculation.shape:
        draft = tree = propose_tree(*anchored, speculation.shape)
        first_B = tree.token_BxN[:, 0]
    else:
        go_on = functools.partial(_go_on, state, cost_K1) if speculation.adaptive else None
        draft = chain = propose(*anchored, speculation.window, sampling, _keys(state, 0), go_on)
        first_B = chain.token_BxMxK[:, 0, 0] - NONE  # not negative
    start_B = cache.after(start_B, first_B)
    return state.replace(drafter_kv=cache.write(state.drafter_kv, new, start_B)), draft


def _go_on(state: State, cost_K1: Array, drafted: int, logp_Bx1: Array) -> Array:
    going_B = state.pace.drafts_B & ~state.done_B
    if drafted:  # the first token is always tried: it shows how drafts fare
        going_B &= worth_going_on(state.pace, drafted, logp_Bx1[:, 0], cost_K1)
    return going_B[:, None]


def _keys(state: State, use: int) -> Array:
    """A key per row, for its length and one use."""
    return jax.vmap(lambda k, n: jax.random.fold_in(jax.random.fold_in(k, n), use))(state.key_B, state.length_B)


def verify_window(
    params,
    config: ModelConfig,
    drafter: Drafter | None,
    state: State,
    draft: Draft | Tree | None,
    speculation: Speculation,
    sampling: Sampling,
    cost_K1: Array | None = None,
) -> tuple[State, Round]:
    """Runs the target over root and draft, accepts, and commits tokens, keys and features."""
    judge = functools.partial(_judge, params, config, drafter, state, speculation, sampling)
    root_B = state.length_B - 1
    if draft is None:
        drafted_B, result = jnp.zeros_like(root_B), judge(None)
    elif isinstance(draft, Tree):
        drafted_B, result = jnp.full_like(root_B, speculation.shape.nodes), judge(draft)
    elif not speculation.adaptive:
        drafted_B, result = jnp.full_like(root_B, speculation.window), judge(draft)
    else:
        drafted_B = draft.drafted_BxM[:, 0]
        widths = speculation.widths
        widest = jnp.searchsorted(jnp.asarray(widths), drafted_B.max())
        result = jax.lax.switch(widest, [functools.partial(judge, draft, w) for w in widths])

    start_B = cache.after(root_B, result.token_BxK1[:, 0])
    target_kv = tuple(cache.write(old, new, start_B) for old, new in zip(state.target_kv, result.kv, strict=True))
    counted_B = jnp.where(state.done_B, 0, 1)
    K1 = state.histogram_BxK1.shape[1]
    accepted_BxK1 = jax.nn.one_hot(result.accepted_B, K1, dtype=jnp.int32)
    before_B = state.length_B
    pace = state.pace
    if speculation.adaptive:  # by its own width alone, so that a row does not depend on its neighbours
        pace = update(pace, result.accepted_B, drafted_B, cost_K1[drafted_B])
    healthy_B = state.healthy_B & (state.done_B | result.healthy_B)
    state = state.replace(
        done_B=state.done_B | ~healthy_B,
        healthy_B=healthy_B,
        target_kv=target_kv,
        histogram_BxK1=state.histogram_BxK1 + counted_B[:, None] * accepted_BxK1,
        drafted_B=state.drafted_B + counted_B * drafted_B,
        pace=pace,
    )
    state = _commit_tokens(state, result.token_BxK1, result.accepted_B + 1, config)
    pending_B = jnp.maximum(state.length_B - before_B, 1)
    return state.replace(features_BxK1xF=result.features_BxK1xF, pending_B=pending_B), result


def _judge(
    params, config, drafter, state: State, speculation: Speculation, sampling, draft, width: int | None = None
) -> Round:
    """The target's pass over a window and what it accepts. width: look at so many drafted tokens only."""
    B, L = state.tokens_BxL.shape
    root_B = state.length_B - 1
    root_Bx1 = jnp.take_along_axis(state.tokens_BxL, root_B[:, None], 1)
    if isinstance(draft, Draft) and width is not None and width < speculation.window:
        draft = None if width == 0 else jax.tree.map(lambda x: x[:, :, :width], draft)
    window = _window(root_Bx1, draft)
    out = transformer.forward(
        params,
        config,
        window.token_BxN1,
        root_B[:, None] + window.depth_BxN1,
        window.seen_BxN1xN1,
        [Context(state.target_kv, cache.visible(L, root_B, window.token_BxN1.shape[1]), jnp.arange(L))],
        drafter.config.feature_layers if drafter else (),
    )
    logits = transformer.logits(params, out.hidden_BxSxD)
    healthy_B = _usable(logits).all(1)
    if isinstance(draft, Tree):
        accepted_B, index_BxK1, token_BxK1 = _accept_tree(state, draft, logits, sampling, speculation.window)
        kv = tuple(compact(new, index_BxK1) for new in out.kv)
        features = jnp.take_along_axis(out.features_BxSxF, index_BxK1[..., None], 1)
        return Round(accepted_B, token_BxK1, out.hidden_BxSxD, features, kv, index_BxK1, healthy_B)
    accepted_B, token_BxK1 = _accept_chain(state, draft, logits, drafter, speculation, sampling)
    short = speculation.window + 1 - token_BxK1.shape[1]  # of a narrower window; what is padded is never read

    def pad(x, axis):
        return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)]) if short else x

    index_BxK1 = jnp.broadcast_to(jnp.arange(speculation.window + 1), (B, speculation.window + 1))
    kv = tuple(KV(pad(k, 3), pad(v, 2)) for k, v in out.kv)
    features = None if out.features_BxSxF is None else pad(out.features_BxSxF, 1)
    return Round(accepted_B, pad(token_BxK1, 1), pad(out.hidden_BxSxD, 1), features, kv, index_BxK1, healthy_B)


def _window(root_Bx1: Array, draft: Draft | Tree | None) -> Window:
    B = root_Bx1.shape[0]
    if isinstance(draft, Tree):
        token_BxN1 = jnp.concatenate([root_Bx1, draft.token_BxN], 1)
        return Window(token_BxN1, draft.depth_BxN1, draft.seen_BxN1xN1)
    token_BxN1 = root_Bx1
    if draft is not None:
        token_BxN1 = jnp.concatenate([root_Bx1, jnp.maximum(draft.token_BxMxK[:, 0], 0)], 1)
    N1 = token_BxN1.shape[1]
    return Window(token_BxN1, jnp.broadcast_to(jnp.arange(N1), (B, N1)), transformer.causal_mask(B, N1))


def _accept_chain(state: State, draft: Draft | None, logits_BxK1xV, drafter, speculation, sampling):
    """(accepted_B, token_BxK1)."""
    if draft is None:
        # With the key of `accept_sampled`: a row that drafts nothing draws the same token beside one that drafts.
        key_B = jax.vmap(lambda key: jax.random.split(key)[1])(_keys(state, 1))
        token_B = draw(key_B, logits_BxK1xV[:, 0], sampling)[0]
        return jnp.zeros_like(token_B), token_B[:, None]
    if sampling.greedy:
        return accept_greedy(draft.token_BxMxK[:, 0], argmax(logits_BxK1xV))
    accept = functools.partial(accept_sampled, rule=block_wise if speculation.block else token_wise)
    return jax.vmap(accept, in_axes=(0, 0, 0, None, 0))(
        _keys(state, 1),
        jnp.maximum(draft.token_BxMxK[:, 0], 0),
        draft.log_q_BxMxKxW[:, 0],
        drafter.target_ids_W,
        log_distribution(logits_BxK1xV, sampling),
    )


def _accept_tree(state: State, tree: Tree, logits_BxN1xV, sampling: Sampling, depth: int):
    """(accepted_B, index_BxK1, token_BxK1)."""
    if sampling.greedy:
        best_BxN1 = argmax(logits_BxN1xV)
        drawn_BxN = tree.token_BxN == jnp.take_along_axis(best_BxN1, tree.parent_BxN, 1)
        path = follow(tree, drawn_BxN, depth)
        last_Bx1 = jnp.take_along_axis(path.index_BxD1, path.accepted_B[:, None], 1)
        own_B = jnp.take_along_axis(best_BxN1, last_Bx1, 1)[:, 0]
    else:
        log_p_BxN1xV = log_distribution(logits_BxN1xV, sampling)
        parent_BxNx1 = tree.parent_BxN[..., None]
        log_p_BxN = jax.vmap(lambda p, i, t: p[i, t])(log_p_BxN1xV, parent_BxNx1[..., 0], tree.token_BxN)
        u_BxN1 = jax.vmap(lambda key: jax.random.uniform(key, log_p_BxN1xV.shape[1:2]))(_keys(state, 0))
        path = follow(tree, children_drawn(tree, jnp.exp(log_p_BxN), u_BxN1), depth)
        last_B = jnp.take_along_axis(path.index_BxD1, path.accepted_B[:, None], 1)[:, 0]
        p_BxV = jnp.exp(jnp.take_along_axis(log_p_BxN1xV, last_B[:, None, None], 1)[:, 0])
        own_B = jax.vmap(sample)(_keys(state, 1), jnp.log(remainder(tree, last_B, p_BxV)))
    kept_BxK = jnp.take_along_axis(jnp.pad(tree.token_BxN, ((0, 0), (1, 0))), path.index_BxD1[:, 1:], 1)
    return path.accepted_B, path.index_BxD1, emitted(kept_BxK, path.accepted_B, own_B)


@functools.partial(jax.jit, static_argnames=("config", "speculation"), donate_argnames=("state",))
def decode(
    params: dict,
    config: ModelConfig,
    drafter: Drafter | None,
    state: State,
    rounds: Array | int,
    *,
    speculation: Speculation,
    sampling: Sampling,
    cost_K1: Array | None = None,
) -> State:
    """Rounds until every row is done, or `rounds` of them.

    speculation: its window is the state's K. cost_K1: see `draft_window`.
    """

    def unfinished(carry):
        step, state = carry
        return (step < rounds) & ~state.done_B.all()

    def one_round(carry):
        step, state = carry
        draft, speaker = None, drafter if speculation.window else None
        if speaker:
            state, draft = draft_window(params, drafter, state, speculation, sampling, cost_K1)
        state, _ = verify_window(params, config, speaker, state, draft, speculation, sampling, cost_K1)
        return step + 1, state

    return jax.lax.while_loop(unfinished, one_round, (0, state))[1]
