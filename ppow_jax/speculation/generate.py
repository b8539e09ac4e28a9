"""A whole generation as one XLA program: prefill, then rounds of propose -> verify -> accept -> commit.

A round commits 1..K+1 tokens per row, whether it drafts a chain or a tree. Plain autoregressive decoding is the same
round with K = 0. `speculation.state` says what is carried from round to round.
"""

import functools

import jax
import jax.numpy as jnp

from ppow_jax import sharding
from ppow_jax.models import cache, stack, transformer
from ppow_jax.models import drafter as drafting
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter, Prefix
from ppow_jax.speculation.adaptive import update, worth_going_on
from ppow_jax.speculation.judge import Round, judge
from ppow_jax.speculation.prefill import prefill
from ppow_jax.speculation.propose import NONE, Draft, propose
from ppow_jax.speculation.sampling import Sampling
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.state import Prompts, State, cache_length, commit_tokens, row_keys
from ppow_jax.speculation.tree import Tree, propose_tree

__all__ = ["Prompts", "Round", "State", "cache_length", "decode", "draft_window", "prefill", "verify_window"]

Array = jax.Array


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
    embed_BxK1xE = drafter.embed(params["embed"], following_BxK1)
    L = state.tokens_BxL.shape[1]
    earlier = [Prefix(state.drafter_kv, cache.visible(L, start_B, K1))]
    causal = transformer.causal_mask(B, K1)
    new = drafting.prefix_keys(drafter, g_BxK1xE, embed_BxK1xE, index_BxK1, causal, earlier)

    last_Bx1 = (state.pending_B - 1)[:, None]
    g_Bx1xE = jnp.take_along_axis(g_BxK1xE, last_Bx1[..., None], 1)
    root_Bx1 = jnp.take_along_axis(following_BxK1, last_Bx1, 1)
    prefix = [
        Prefix(state.drafter_kv, cache.visible(L, start_B, 1)),
        Prefix(new, cache.visible(K1, state.pending_B, 1)),
    ]
    anchor_Bx1 = state.length_B[:, None] - 2
    anchored = drafter, params["embed"], g_Bx1xE, root_Bx1, anchor_Bx1, prefix
    draft: Draft | Tree
    if speculation.shape:
        draft = tree = propose_tree(*anchored, speculation.shape)
        first_B = tree.token_BxN[:, 0]
    else:
        go_on = functools.partial(_go_on, state, cost_K1) if speculation.adaptive else None
        draft = chain = propose(*anchored, speculation.window, sampling, row_keys(state, 0), go_on)
        first_B = chain.token_BxMxK[:, 0, 0] - NONE  # not negative
    start_B = cache.after(start_B, first_B)
    drafter_kv = tuple(cache.write(old, new, start_B) for old, new in zip(state.drafter_kv, new, strict=True))
    return state.replace(drafter_kv=drafter_kv), draft


def _go_on(state: State, cost_K1: Array, drafted: int, logp_Bx1: Array) -> Array:
    going_B = state.pace.drafts_B & ~state.done_B
    if drafted:  # the first token is always tried: it shows how drafts fare
        going_B &= worth_going_on(state.pace, drafted, logp_Bx1[:, 0], cost_K1)
    return going_B[:, None]


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
    judged = functools.partial(judge, params, config, drafter, state, speculation, sampling)
    root_B = state.length_B - 1
    if draft is None:
        drafted_B, result = jnp.zeros_like(root_B), judged(None)
    elif isinstance(draft, Tree):
        drafted_B, result = jnp.full_like(root_B, speculation.shape.nodes), judged(draft)
    elif not speculation.adaptive:
        drafted_B, result = jnp.full_like(root_B, speculation.window), judged(draft)
    else:
        drafted_B = draft.drafted_BxM[:, 0]
        widths = speculation.widths
        widest = jnp.searchsorted(jnp.asarray(widths), drafted_B.max())
        result = jax.lax.switch(widest, [functools.partial(judged, draft, w) for w in widths])

    start_B = cache.after(root_B, result.token_BxK1[:, 0])
    target_kv = stack.each_layer(functools.partial(cache.write, start_B=start_B), state.target_kv, result.kv)
    counted_B = jnp.where(state.done_B, 0, 1)
    K1 = state.histogram_BxK1.shape[1]
    accepted_BxK1 = jax.nn.one_hot(result.accepted_B, K1, dtype=jnp.int32)
    before_B = state.length_B
    pace = state.pace
    if speculation.adaptive:  # by its own width alone, so that a row does not depend on its neighbours
        pace = update(pace, result.accepted_B, drafted_B, cost_K1[drafted_B])
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
        pace=pace,
        experts_B=experts_B,
    )
    state = commit_tokens(state, result.token_BxK1, result.accepted_B + 1, config)
    pending_B = jnp.maximum(state.length_B - before_B, 1)
    return state.replace(features_BxK1xF=result.features_BxK1xF, pending_B=pending_B), result


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

    return sharding.constrain(jax.lax.while_loop(unfinished, one_round, (0, state))[1])
