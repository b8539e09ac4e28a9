"""Acceptance rules: how many drafted tokens are kept, and the token that the target adds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.speculation.sampling import sample

Array = jax.Array


class Verdict(NamedTuple):
    """accepted_...: how many of the K drafted tokens are kept. token_...xK1: the kept tokens, then the target's own
    token at index `accepted`, then padding (repeats of it).
    """

    accepted: Array
    token: Array


def emitted(draft_xK: Array, accepted: Array, bonus: Array) -> Array:
    """The kept draft tokens followed by the target's token: [..., K1]."""
    padded_xK1 = jnp.concatenate([draft_xK, bonus[..., None]], -1)
    return jnp.where(jnp.arange(padded_xK1.shape[-1]) < accepted[..., None], padded_xK1, bonus[..., None])


def leading(match_xK: Array) -> Array:
    """Length of the leading run of True along the last axis, int32."""
    return jnp.cumprod(match_xK.astype(jnp.int32), axis=-1).sum(-1)


def accepted_greedy(draft_xK: Array, argmax_xK: Array) -> Array:
    """Number of drafted tokens that greedy acceptance keeps: those until the first that is not the target's argmax."""
    return leading(draft_xK == argmax_xK)


def accepted_sampled(u_xK: Array, log_q_xK: Array, log_p_xK: Array) -> Array:
    """Number of drafted tokens that token-wise rejection keeps: those until the first with u q >= p.

    u_xK: uniform over [0, 1). log_q_xK, log_p_xK: log-probabilities that drafter and target give to the drafted tokens.
    Counts follow the same distribution as those of `accept_sampled` with `token_wise`, which uses one number for all.
    """
    return leading(u_xK * jnp.exp(log_q_xK) < jnp.exp(log_p_xK))


def accept_greedy(draft_xK: Array, argmax_xK1: Array) -> Verdict:
    """Keeps drafted tokens while each is the target's argmax; adds the argmax after them (temperature 0)."""
    accepted = accepted_greedy(draft_xK, argmax_xK1[..., :-1])
    bonus = jnp.take_along_axis(argmax_xK1, accepted[..., None], -1)[..., 0]
    return Verdict(accepted, emitted(draft_xK, accepted, bonus))


def likelihood_ratio(p: Array, q: Array) -> Array:
    """p / q of a token that was drawn with probability q; 0 where q is 0, that is where no token was drawn."""
    return jnp.where(q > 0, p / jnp.maximum(q, jnp.finfo(q.dtype).tiny), 0.0)


def residual(p_xV: Array, q_xV: Array, scale: Array | float = 1.0) -> Array:
    """Residual distribution, from which the token after the kept ones is drawn: norm(max(scale p - q, 0)).

    Rounding can leave no mass where both are equal; p is then the correct distribution.
    """
    rest_xV = jnp.maximum(scale * p_xV - q_xV, 0.0)
    total = rest_xV.sum(-1, keepdims=True)
    return jnp.where(total > 0, rest_xV / jnp.where(total > 0, total, 1.0), p_xV)


class Chances(NamedTuple):
    """Acceptance probabilities of a drafted window under one rule.

    reach_xK: probability that at least 1..K drafted tokens are kept. scale_xK1: the weight of p against q in the
    distribution of the token that is added after 0..K kept ones, see `added`.
    """

    reach_xK: Array
    scale_xK1: Array


def token_wise(draft_xK: Array, p_xK1xV: Array, q_xKxV: Array) -> Chances:
    """Keeps each token with probability min(1, p / q), given those before it (Leviathan et al., 2211.17192)."""
    keep_xK = jnp.minimum(_ratios(draft_xK, p_xK1xV, q_xKxV), 1.0)
    return Chances(jnp.cumprod(keep_xK, -1), jnp.ones_like(p_xK1xV[..., 0]))


def block_wise(draft_xK: Array, p_xK1xV: Array, q_xKxV: Array) -> Chances:
    """Block verification (Sun et al., 2403.10444, algorithm 2): tests prefixes, not tokens, and so keeps more.

    With w_0 = 1 and w_i = min(w_{i-1} p_i(x_i) / q_i(x_i), 1), the prefix of i < K tokens passes with probability
    h_i = spare / (spare + 1 - w_i), where spare = sum_v max(w_i p(v) - q(v), 0), and that of K tokens with h_K = w_K;
    the longest that passes is kept.
    """
    K = draft_xK.shape[-1]
    ratio_xK, scale = _ratios(draft_xK, p_xK1xV, q_xKxV), [jnp.ones_like(p_xK1xV[..., 0, 0])]
    for i in range(K):
        scale.append(jnp.minimum(scale[-1] * ratio_xK[..., i], 1.0))
    scale_xK1 = jnp.stack(scale, -1)
    inner = scale_xK1[..., 1:K]
    spare = jnp.maximum(inner[..., None] * p_xK1xV[..., 1:K, :] - q_xKxV[..., 1:, :], 0.0).sum(-1)
    whole = spare + 1.0 - inner
    passes = jnp.where(whole > 0, spare / jnp.where(whole > 0, whole, 1.0), 1.0)  # 0/0: a longer prefix passes
    fails_xK = 1.0 - jnp.concatenate([passes, scale_xK1[..., K:]], -1)
    return Chances(1.0 - jnp.cumprod(fails_xK[..., ::-1], -1)[..., ::-1], scale_xK1)


def _ratios(draft_xK: Array, p_xK1xV: Array, q_xKxV: Array) -> Array:
    p_xK, q_xK = (jnp.take_along_axis(x, draft_xK[..., None], -1)[..., 0] for x in (p_xK1xV[..., :-1, :], q_xKxV))
    return likelihood_ratio(p_xK, q_xK)


def added(accepted: Array, scale_xK1: Array, p_xK1xV: Array, q_xKxV: Array) -> Array:
    """Distribution [..., V] of the target's own token after `accepted` kept ones: `residual`, or p after all K."""
    K = q_xKxV.shape[-2]
    at = accepted[..., None, None]
    p_xV = jnp.take_along_axis(p_xK1xV, at, -2)[..., 0, :]
    q_xV = jnp.take_along_axis(q_xKxV, jnp.minimum(at, K - 1), -2)[..., 0, :]
    scale = jnp.take_along_axis(scale_xK1, accepted[..., None], -1)
    return jnp.where(accepted[..., None] < K, residual(p_xV, q_xV, scale), p_xV)


def accept_sampled(
    key: Array,
    own_key: Array,
    draft_xK: Array,
    log_q_xKxW: Array,
    target_ids_W: Array,
    log_p_xK1xV: Array,
    rule: Callable[[Array, Array, Array], Chances] = token_wise,
) -> Verdict:
    """Samples the number of kept tokens, and with `own_key` the token after them, so that the emitted tokens follow p.

    log_q_xKxW: log-probabilities, over the draft vocabulary, of the distributions that the drafts were drawn from.
    log_p_xK1xV: the target's log-probabilities.
    """
    p_xK1xV = jnp.exp(log_p_xK1xV)
    q_xKxV = jnp.zeros_like(p_xK1xV[:-1]).at[:, target_ids_W].set(jnp.exp(log_q_xKxW))
    chances = rule(draft_xK, p_xK1xV, q_xKxV)
    accepted = jnp.sum(jax.random.uniform(key) < chances.reach_xK, dtype=jnp.int32)
    token = sample(own_key, added(accepted, chances.scale_xK1, p_xK1xV, q_xKxV))
    return Verdict(accepted, emitted(draft_xK, accepted, token))
