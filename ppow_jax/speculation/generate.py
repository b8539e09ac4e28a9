"""A whole generation as one XLA program: prefill, then rounds of propose -> verify -> accept -> commit.

A round commits 1..K+1 tokens per row, whether it drafts a chain or a tree. Plain autoregressive decoding is the same
round with K = 0. `speculation.state` documents what is carried from round to round.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.models import cache, stack, transformer
from ppow_jax.models import drafter as drafting
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.models.layers import KV
from ppow_jax.speculation import mixture, ngram, sources
from ppow_jax.speculation.adaptive import AcceptanceStats, CostTable, continues, kept, update
from ppow_jax.speculation.prefill import prefill
from ppow_jax.speculation.propose import NONE, Draft, propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import THROUGHPUT, Speculation
from ppow_jax.speculation.sources import Drafts
from ppow_jax.speculation.state import Prompts, State, cache_length, commit_tokens, row_keys
from ppow_jax.speculation.tree import Candidates, Tree, draft_candidates, propose_tree
from ppow_jax.speculation.verification import Verification, verify_draft

__all__ = ["Prompts", "Verification", "State", "cache_length", "decode", "draft_window", "prefill", "verify_window"]

Array = jax.Array
Carry = tuple[Any, State]  # number of rounds so far, and the state


def draft_window(
    params: dict[str, Any],
    drafter: Drafter | None,
    state: State,
    speculation: Speculation,
    sampling: Sampling,
    cost_table: CostTable | None = None,
    store_S: Array | None = None,
) -> tuple[State, Draft | Tree | Drafts]:
    """Drafts after each row's root, and writes the pending features into the drafter's cache.

    drafter: None for n-gram lookup, which has no cache. cost_table: cost table that adaptive windows decide by.
    store_S: earlier texts for lookups, see `ngram.find`.
    """
    if drafter is None:
        return state, _looked_up(state, speculation, cost_table, store_S)
    start_B, g_BxK1xE, following_BxK1, new = _pending_keys(params, drafter, state)
    K1, L = g_BxK1xE.shape[1], state.tokens_BxL.shape[1]
    last_Bx1 = (state.pending_B - 1)[:, None]
    g_Bx1xE = jnp.take_along_axis(g_BxK1xE, last_Bx1[..., None], 1)
    root_Bx1 = jnp.take_along_axis(following_BxK1, last_Bx1, 1)
    prefix = [
        Prefix(state.drafter_kv, cache.visible(L, start_B, 1)),
        Prefix(new, cache.visible(K1, state.pending_B, 1)),
    ]
    anchor_Bx1 = state.length_B[:, None] - 2
    anchored = drafter, params["embed"], g_Bx1xE, root_Bx1, anchor_Bx1, prefix
    how = _decisions(state, speculation, sampling, cost_table) if speculation.adaptive else {}
    draft: Draft | Tree | Drafts
    if speculation.lookup:
        draft = _mixed(anchored, state, speculation, cost_table, store_S)
        first_B = draft.tree.token_BxN.min(-1)
    elif speculation.shape:
        draft = tree = propose_tree(*anchored, speculation.shape, **how)
        first_B = tree.token_BxN.min(-1)  # minimum over all, which orders the cache write after every read
    else:
        draft = chain = propose(*anchored, speculation.window, sampling, row_keys(state, 0), **how)
        first_B = chain.token_BxMxK[:, 0].min(-1) - NONE  # not negative
    drafter_kv = _written(state.drafter_kv, new, cache.after(start_B, first_B))
    return state.replace(drafter_kv=drafter_kv, pending_B=jnp.zeros_like(state.pending_B)), draft


def _looked_up(
    state: State, speculation: Speculation, cost_table: CostTable | None, store_S: Array | None
) -> Drafts:
    """N-gram lookup by itself."""
    match = ngram.find(state.tokens_BxL, state.length_B, speculation.lookup, store_S)
    return mixture.lookup(
        state.stats, state.sources, speculation.adaptive or THROUGHPUT, cost_table, match, ~state.done_B
    )


def _mixed(
    anchored: Any, state: State, speculation: Speculation, cost_table: CostTable | None, store_S: Array | None
) -> Drafts:
    """A tree of both sources. anchored: see `draft_candidates`."""
    match = ngram.find(state.tokens_BxL, state.length_B, speculation.lookup, store_S)

    def draft(go_on: Callable[[int, Array], Array] | None) -> Candidates:
        return draft_candidates(*(*anchored, speculation.shape, go_on))

    return mixture.mixed(draft, state.stats, state.sources, speculation, cost_table, match, ~state.done_B)


def _pending_keys(params: dict[str, Any], drafter: Drafter, state: State) -> tuple[Array, Array, Array, tuple[KV, ...]]:
    """(first pending index_B, and for each pending index: fused features, the token after it, the drafter's keys)."""
    B, K1 = state.features_BxK1xF.shape[:2]
    start_B = state.length_B - 1 - state.pending_B
    index_BxK1 = start_B[:, None] + jnp.arange(K1)
    following_BxK1 = jnp.take_along_axis(state.tokens_BxL, index_BxK1 + 1, 1)
    g_BxK1xE = drafting.fuse(drafter, state.features_BxK1xF)
    embed_BxK1xE = drafter.embed(params["embed"], following_BxK1)
    earlier = [Prefix(state.drafter_kv, cache.visible(state.tokens_BxL.shape[1], start_B, K1))]
    causal = transformer.causal_mask(B, K1)
    new = drafting.prefix_keys(drafter, g_BxK1xE, embed_BxK1xE, index_BxK1, causal, earlier)
    return start_B, g_BxK1xE, following_BxK1, new


def _written(drafter_kv: tuple[KV, ...], new: tuple[KV, ...], start_B: Array) -> tuple[KV, ...]:
    return tuple(cache.write(old, new, start_B) for old, new in zip(drafter_kv, new, strict=True))


def _absorb(params: dict[str, Any], drafter: Drafter, state: State) -> State:
    """Writes all pending features but the last, from which the next draft starts, into the drafter's cache."""
    start_B, *_, new = _pending_keys(params, drafter, state)
    last_BxF = jnp.take_along_axis(state.features_BxK1xF, (state.pending_B - 1)[:, None, None], 1)[:, 0]
    features = state.features_BxK1xF.at[:, 0].set(last_BxF)
    drafter_kv = _written(state.drafter_kv, new, start_B)
    return state.replace(drafter_kv=drafter_kv, features_BxK1xF=features, pending_B=jnp.ones_like(state.pending_B))


def _deciding(state: State, speculation: Speculation, sampling: Sampling) -> Array | None:
    """[B]: the rows that decide together about an adaptive window; None where each decides by itself."""
    return ~state.done_B if speculation.decides_together(sampling) else None


def _decisions(state: State, speculation: Speculation, sampling: Sampling, cost_table: CostTable) -> dict[str, Any]:
    """Keyword arguments of `propose` and `propose_tree` that make a window adaptive."""
    stats, stopping, live_B = state.stats, speculation.adaptive, _deciding(state, speculation, sampling)

    def go_on(steps: int, logp_BxX: Array) -> Array:
        if steps == 0:  # the first step is always taken: its outcome feeds the acceptance statistics
            return stats.drafts_B & ~state.done_B
        price = cost_table.of_step(steps, widens=speculation.shape is None)
        return continues(stats, stopping, price, logp_BxX, live_B)

    if not speculation.shape:
        return {"go_on": lambda steps, logp_Bx1: go_on(steps, logp_Bx1)[:, None]}
    keep = functools.partial(kept, stats, stopping, cost_table.verify_N1, live_B=live_B)
    return {"go_on": go_on, "keep": keep}


def verify_window(
    params: dict[str, Any],
    config: ModelConfig,
    drafter: Drafter | None,
    state: State,
    draft: Draft | Tree | Drafts | None,
    speculation: Speculation,
    sampling: Sampling,
    cost_table: CostTable | None = None,
    width: int | None = None,
) -> tuple[State, Verification]:
    """Runs the target over root and draft, accepts, and commits tokens, keys and features.

    width: verify only the first `width` places of the draft, which must hold all drafted tokens.
    """
    result = verify_draft(params, config, drafter, state, speculation, sampling, _cut(draft, width))
    return _commit(config, state, draft, result, speculation, sampling, cost_table), result


def _cut(draft: Draft | Tree | Drafts | None, width: int | None) -> Draft | Tree | None:
    """The first `width` places of a draft, None for no place; all of them if width is None."""
    tokens = draft.tree if isinstance(draft, Drafts) else draft
    return tokens if width is None else tokens.cut(width) if width else None


def _commit(
    config: ModelConfig,
    state: State,
    draft: Draft | Tree | Drafts | None,
    result: Verification,
    speculation: Speculation,
    sampling: Sampling,
    cost_table: CostTable | None,
) -> State:
    """Commits what was verified: tokens, keys, features and statistics."""
    root_B = state.length_B - 1
    drafted_B = jnp.zeros_like(root_B) if draft is None else draft.count_B
    start_B = cache.after(root_B, result.token_BxK1[:, 0])
    target_kv = stack.each_layer(functools.partial(cache.write, start_B=start_B), state.target_kv, result.kv)
    counted_B = jnp.where(state.done_B, 0, 1)
    K1 = state.histogram_BxK1.shape[1]
    accepted_BxK1 = jax.nn.one_hot(result.accepted_B, K1, dtype=jnp.int32)
    before_B = state.length_B
    stats, found = state.stats, state.sources
    if isinstance(draft, Drafts):
        if cost_table is not None:
            verified = result.token_BxK1, result.index_BxK1, result.accepted_B
            stats, found = mixture.settle(stats, found, draft, *verified, cost_table, ~state.done_B)
    elif speculation.adaptive:
        live_B = _deciding(state, speculation, sampling)
        stats = _updated(stats, draft, drafted_B, result.accepted_B, cost_table, live_B)
    healthy_B = state.healthy_B & (state.done_B | result.healthy_B)
    experts_B = state.experts_B
    if experts_B is not None:
        experts_B += counted_B * result.experts_B
    state = state.replace(
        done_B=state.done_B | ~healthy_B,
        healthy_B=healthy_B,
        target_kv=target_kv,
        histogram_BxK1=state.histogram_BxK1 + counted_B[:, None] * accepted_BxK1,
        drafted_B=state.drafted_B + counted_B * drafted_B,
        stats=stats,
        sources=found,
        experts_B=experts_B,
    )
    state = commit_tokens(state, result.token_BxK1, result.accepted_B + 1, config)
    if state.source_BxL is not None:
        state = state.replace(source_BxL=cache.write_rows(state.source_BxL, _sources(draft, result), before_B))
    if not speculation.needs_drafter:
        return state
    gained_B = jnp.maximum(state.length_B - before_B, 1)
    features, pending_B = result.features_BxK1xF, gained_B
    if speculation.adaptive:  # appended to those of cooldown rounds, which wait for a round that drafts
        features = cache.write_rows(state.features_BxK1xF, features, state.pending_B)
        pending_B += state.pending_B
    return state.replace(features_BxK1xF=features, pending_B=pending_B)


def _sources(draft: Draft | Tree | Drafts | None, result: Verification) -> Array:
    """int8 [B, K1]: sources of the accepted tokens, then 0, see `sources.ORIGINS`."""
    if isinstance(draft, Drafts):
        path_BxK = sources.on_path(draft.source_BxN, result.index_BxK1, result.accepted_B)
    else:
        K = result.token_BxK1.shape[1] - 1
        path_BxK = jnp.where(jnp.arange(K) < result.accepted_B[:, None], sources.DRAFTER, 0)
    return jnp.pad(path_BxK, ((0, 0), (0, 1))).astype(jnp.int8)


def _at_width(widths: Sequence[int], count: Array, verify: Callable[..., Verification], K1: int) -> Verification:
    """Calls `verify` with the least of `widths` that holds `count` drafted tokens.

    Only what is committed leaves the `switch`, padded to K1 places: XLA copies the results of its branches, but neither
    copies the caches that they read, nor compiles for each width how they are written.
    """
    branches = [lambda width=width: _padded(verify(width), K1) for width in widths]
    return jax.lax.switch(jnp.searchsorted(jnp.asarray(widths), count), branches)


def _padded(result: Verification, K1: int) -> Verification:
    """A verification padded to K1 places, as that of a longer window in which no more tokens are accepted.

    Of the hidden states it keeps the root's, because each width has another number of them.
    """
    missing = K1 - result.token_BxK1.shape[1]

    def pad(x: Array, axis: int, mode: str = "constant") -> Array:
        return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)], mode)

    return result._replace(
        token_BxK1=pad(result.token_BxK1, 1, "edge"),
        index_BxK1=pad(result.index_BxK1, 1, "edge"),
        hidden_BxN1xD=result.hidden_BxN1xD[:, :1],
        features_BxK1xF=None if result.features_BxK1xF is None else pad(result.features_BxK1xF, 1),
        kv=stack.each_layer(lambda kv: KV(pad(kv.k_BxKvxdxL, 3), pad(kv.v_BxKvxLxd, 2)), result.kv),
    )


def _drafts(state: State) -> Array:
    """True if any live row drafts in the next round."""
    return (state.stats.drafts_B & ~state.done_B).any()


def _updated(
    stats: AcceptanceStats,
    draft: Draft | Tree | None,
    drafted_B: Array,
    accepted_B: Array,
    cost_table: CostTable,
    live_B: Array | None,
) -> AcceptanceStats:
    if draft is None:
        none_B = jnp.zeros_like(accepted_B)
        return update(stats, none_B, none_B, none_B, none_B, none_B, live_B)
    if isinstance(draft, Tree):
        steps_B, depth_B, logp_BxN = draft.steps_B, draft.depth_BxN1.max(-1), draft.logp_BxN
    else:
        steps_B = depth_B = drafted_B
        logp_BxN = jnp.where(draft.token_BxMxK[:, 0] == NONE, -jnp.inf, jnp.cumsum(draft.logp_BxMxK[:, 0], -1))
    paid_B = (steps_B, drafted_B) if live_B is None else (steps_B.max(), drafted_B.max())
    cost_B = jnp.broadcast_to(cost_table.of_round(*paid_B), accepted_B.shape)
    return update(stats, accepted_B, steps_B, depth_B, jnp.exp(logp_BxN).sum(-1), cost_B, live_B)


@functools.partial(jax.jit, static_argnames=("config", "speculation"), donate_argnames=("state",))
def decode(
    params: dict[str, Any],
    config: ModelConfig,
    drafter: Drafter | None,
    state: State,
    rounds: Array | int,
    *,
    speculation: Speculation,
    sampling: Sampling,
    cost_table: CostTable | None = None,
    store_S: Array | None = None,
) -> State:
    """Decodes until every row is done, or for at most `rounds` rounds.

    speculation: its window must be the state's K. cost_table, store_S: see `draft_window`.
    """

    def unfinished(carry: Carry) -> Array:
        step, state = carry
        return (step < rounds) & ~state.done_B.all()

    def one_round(carry: Carry, drafts: bool) -> Carry:
        step, state = carry
        draft, used = None, drafter if speculation.needs_drafter else None
        if drafts:
            state, draft = draft_window(params, used, state, speculation, sampling, cost_table, store_S)

        def verify(width: int | None = None) -> Verification:
            return verify_draft(params, config, used, state, speculation, sampling, _cut(draft, width))

        if draft is not None and speculation.adaptive:
            result = _at_width(speculation.widths, draft.count_B.max(), verify, speculation.window + 1)
        else:
            result = verify()
        return step + 1, _commit(config, state, draft, result, speculation, sampling, cost_table)

    def spell(drafts: bool, condition: Callable[[Carry], Array], carry: Carry) -> Carry:
        return jax.lax.while_loop(condition, functools.partial(one_round, drafts=drafts), carry)

    def resting(carry: Carry) -> Array:
        _, state = carry
        room = (state.pending_B < state.features_BxK1xF.shape[1]).all()
        return unfinished(carry) & ~_drafts(state) & room

    def draft_and_rest(carry: Carry) -> Carry:  # cooldown rounds: a loop of their own, at the cost of plain decoding
        carry = spell(True, lambda carry: unfinished(carry) & _drafts(carry[1]), carry)
        step, state = spell(False, resting, carry)
        return step, _absorb(params, drafter, state)

    start = 0, state
    if speculation.adaptive and not speculation.lookup:
        _, state = jax.lax.while_loop(unfinished, draft_and_rest, start)
    else:
        _, state = spell(bool(speculation.window), unfinished, start)
    return sharding.constrain(state)
