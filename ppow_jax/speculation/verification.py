"""The target's forward pass over a drafted window, and the acceptance of drafted tokens."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models import cache, stack, transformer
from ppow_jax.models.config import ModelConfig
from ppow_jax.models.drafter import Drafter
from ppow_jax.models.layers import KV
from ppow_jax.models.stack import StackedKV
from ppow_jax.models.transformer import Context
from ppow_jax.models.vocabulary import argmax
from ppow_jax.speculation.propose import Draft
from ppow_jax.speculation.sampling import Sampling, draw, log_distribution, sample, weights
from ppow_jax.speculation.settings import Speculation
from ppow_jax.speculation.state import State, row_keys, usable
from ppow_jax.speculation.touched import unique_experts
from ppow_jax.speculation.tree import Tree, compact, follow
from ppow_jax.speculation.verify import accept_greedy, accept_sampled, block_wise, token_wise

Array = jax.Array
ACCEPT, OWN = 1, 2  # uses of a row's keys: chain acceptance, and the target's own tokens (a key per position)


class Window(NamedTuple):
    """Tokens that one round verifies: the root and N drafted tokens, parents first.

    token_BxN1, depth_BxN1 (0 for the root), seen_BxN1xN1: each index's ancestors and itself.
    """

    token_BxN1: Array
    depth_BxN1: Array
    seen_BxN1xN1: Array


class Verification(NamedTuple):
    """Verification result of a window.

    accepted_B: numbers of accepted drafts. token_BxK1: the accepted tokens, then the target's own, then padding.
    hidden_BxN1xD: the target's last hidden state at each index. features_BxK1xF, kv: those of the root and the accepted
    path, in its order, then padding. index_BxK1: their window indices. healthy_B: True if all logits of the target were
    usable. experts_B: distinct experts that the window touched, see `unique_experts`; None for targets without experts.
    """

    accepted_B: Array
    token_BxK1: Array
    hidden_BxN1xD: Array
    features_BxK1xF: Array | None
    kv: tuple[KV | StackedKV, ...]
    index_BxK1: Array
    healthy_B: Array
    experts_B: Array | None = None


def verify_draft(
    params: dict[str, Any], config: ModelConfig, drafter: Drafter | None, state: State, speculation: Speculation,
    sampling: Sampling, draft: Draft | Tree | None,
) -> Verification:
    """Runs the target over a window and applies the acceptance rule."""
    B, L = state.tokens_BxL.shape
    root_B = state.length_B - 1
    root_Bx1 = jnp.take_along_axis(state.tokens_BxL, root_B[:, None], 1)
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
    logits = transformer.logits(params, out.hidden_BxSxD, whole=not sampling.greedy)  # an argmax needs no whole ones
    healthy_B = usable(logits).all(1)
    experts_B = unique_experts(out.experts, config.experts.number) if config.experts else None
    if isinstance(draft, Tree):
        accepted_B, index_BxK1, token_BxK1 = _accept_tree(state, draft, logits, sampling, speculation)
        kv = stack.each_layer(functools.partial(compact, index_BxD1=index_BxK1), out.kv)
        features = out.features_BxSxF
        if features is not None:
            features = jnp.take_along_axis(features, index_BxK1[..., None], 1)
    else:
        accepted_B, token_BxK1 = _accept_chain(state, draft, logits, drafter, speculation, sampling)
        index_BxK1 = jnp.broadcast_to(jnp.arange(token_BxK1.shape[1]), token_BxK1.shape)
        kv, features = out.kv, out.features_BxSxF
    return Verification(accepted_B, token_BxK1, out.hidden_BxSxD, features, kv, index_BxK1, healthy_B, experts_B)


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


def _accept_chain(
    state: State, draft: Draft | None, logits_BxK1xV: Array, drafter: Drafter | None, speculation: Speculation,
    sampling: Sampling,
) -> tuple[Array, Array]:
    """(accepted_B, token_BxK1)."""
    if draft is None:
        token_B = draw(row_keys(state, OWN), logits_BxK1xV[:, 0], sampling)[0]
        return jnp.zeros_like(token_B), token_B[:, None]
    if sampling.greedy:
        return accept_greedy(draft.token_BxMxK[:, 0], argmax(logits_BxK1xV))
    accept = functools.partial(accept_sampled, rule=block_wise if speculation.block else token_wise)
    return jax.vmap(accept, in_axes=(0, 0, 0, 0, None, 0))(
        row_keys(state, ACCEPT),
        row_keys(state, OWN),
        jnp.maximum(draft.token_BxMxK[:, 0], 0),
        draft.log_q_BxMxKxW[:, 0],
        drafter.target_ids_W,
        log_distribution(logits_BxK1xV, sampling),
    )


def _accept_tree(
    state: State, tree: Tree, logits_BxN1xV: Array, sampling: Sampling, speculation: Speculation
) -> tuple[Array, Array, Array]:
    """(accepted_B, index_BxK1, token_BxK1).

    The target draws one token at each index, with one key for all indices of a depth: the key that plain decoding uses
    at that position, so that both draw the same text.
    """
    if sampling.greedy:
        own_BxN1 = argmax(logits_BxN1xV)
    else:
        key_BxN1 = jax.vmap(lambda depth_B: row_keys(state, OWN, depth_B), 1, 1)(tree.depth_BxN1)
        own_BxN1 = jax.vmap(jax.vmap(sample))(key_BxN1, weights(logits_BxN1xV, sampling))
    drawn_BxN = tree.token_BxN == jnp.take_along_axis(own_BxN1, tree.parent_BxN, 1)
    path = follow(tree, drawn_BxN, speculation.window)
    own_BxK1 = jnp.take_along_axis(own_BxN1, path.index_BxD1, 1)
    return path.accepted_B, path.index_BxD1, own_BxK1
